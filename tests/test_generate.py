"""The contract of `attach` while generating: positions, rows, phases, every kind of cache."""

import copy
import threading
import time

import pytest
import torch
from test_attach import HIDDEN, IDS, hooks_of, logits, make_sae, moved, stream
from tiny_models import ARCHITECTURES, tiny

from saert import ablate, active, add, add_vector, attach, clamp, scale

EDITS = [add(3, 3.0), clamp(5, 1.0), scale(7, -2.0), ablate([8, 9])]
LONG = torch.cat([IDS, IDS.flip(-1)], -1)  # 14 tokens
PAD_MASK = torch.tensor([[0, 0, 0] + [1] * 11, [1] * 14])


def greedy(model, ids=IDS, tokens=6, **options):
    options = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": None} | options
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, pad_token_id=0, **options)


def by_reforwarding(model, ids=IDS, tokens=6):
    """Greedy tokens without any cache: the whole sequence again for each."""
    for _ in range(tokens):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], -1)
    return ids


def edited_positions(model, sae, edit, ids=LONG, **options):
    """For every pass of a generation: where the edit changed the stream, joined in order."""
    clean, dirty, block = [], [], model.get_submodule("transformer.h.1")

    def before(module, args, out):
        clean.append(out[0] if isinstance(out, tuple) else out)

    def after(module, args, out):
        dirty.append(out[0] if isinstance(out, tuple) else out)

    with attach(model, sae, edit):
        first = block.register_forward_hook(before, prepend=True)  # ahead of saert's
        last = block.register_forward_hook(after)
        try:
            greedy(model, ids, **options)
        finally:
            first.remove()
            last.remove()
    return [(a != b).any(-1) for a, b in zip(clean, dirty, strict=True)]


# -- generation equals a full re-forward -----------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generation_with_a_cache_equals_a_full_reforward_with_the_same_edits(name):
    model, sae = tiny(name), make_sae()
    bare = greedy(model)
    with attach(model, sae, EDITS):
        steered = greedy(model)
        assert torch.equal(steered, by_reforwarding(model))
        assert torch.equal(steered, greedy(model, use_cache=False))
    assert torch.equal(greedy(model), bare)


@pytest.mark.parametrize("splice", [False, True])
@pytest.mark.parametrize("activation", ["topk", "jumprelu", "relu"])
def test_generation_equals_a_reforward_for_positions_and_conditions_too(activation, splice):
    model, sae = tiny("llama"), make_sae(activation=activation)
    edits = [add(3, 3.0, positions=slice(2, None, 2)), scale(5, 3.0, when=active(7)), clamp(1, 2.0)]
    with attach(model, sae, edits, splice=splice):
        assert torch.equal(greedy(model), by_reforwarding(model))


def test_without_edits_generation_is_the_bare_models():
    model = tiny("gpt2")
    expected = greedy(model, num_beams=3, output_scores=True, return_dict_in_generate=True)
    with attach(model, make_sae()):
        found = greedy(model, num_beams=3, output_scores=True, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.scores, expected.scores, strict=True))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mistral"])
def test_a_left_padded_batch_generates_what_each_row_generates_alone(name):
    model, sae = tiny(name), make_sae()
    edits = [*EDITS, add(11, 2.0, positions=[0, -1]), add(12, 2.0, phase="generated")]
    with attach(model, sae, edits):
        alone = greedy(model, LONG[:1, 3:])
        padded = greedy(model, LONG, attention_mask=PAD_MASK)
    assert torch.equal(padded[:1, 3:], alone)


# -- which tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}, {"use_cache": False}])
@pytest.mark.parametrize(
    "select, prompt, generated",
    [
        ({"phase": "prompt"}, range(14), []),
        ({"phase": "generated"}, [], range(5)),
        ({"positions": [-1]}, [13], []),
        ({"positions": [2, 15]}, [2], [1]),
        ({"positions": slice(-2, None)}, [12, 13], range(5)),
        ({"positions": slice(-2, None), "phase": "prompt"}, [12, 13], []),
    ],
    ids=str,
)
def test_prompt_and_generated_are_told_apart_by_position(select, prompt, generated, options):
    passes = edited_positions(tiny("gpt2"), make_sae(), add(3, 1.0, **select), **options)
    expected = torch.zeros(2, 19, dtype=torch.bool)
    expected[:, list(prompt)] = True
    expected[:, [14 + g for g in generated]] = True
    if options.get("use_cache") is False:  # every pass holds the whole sequence
        for seen in passes:
            assert torch.equal(seen, expected[:, : seen.shape[1]])
        assert passes[-1].shape[1] == 19
    else:
        assert torch.equal(torch.cat(passes, 1), expected)
    if "prefill_chunk_size" in options:
        assert [p.shape[1] for p in passes[:4]] == [4, 4, 4, 2]


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}])
def test_negative_positions_and_phase_respect_left_padding(options):
    model, sae = tiny("gpt2"), make_sae()
    edit = add(3, 1.0, positions=[0, -2])
    seen = torch.cat(edited_positions(model, sae, edit, attention_mask=PAD_MASK, **options), 1)
    expected = torch.zeros(2, 19, dtype=torch.bool)
    expected[0, [3, 12]] = True
    expected[1, [0, 12]] = True
    assert torch.equal(seen, expected)


def test_a_manual_loop_over_a_cache_keeps_its_prompt():
    model, sae = tiny("gpt2"), make_sae()
    with attach(model, sae, [add(3, 4.0, phase="generated"), add(4, 4.0, positions=-1)]):
        expected = greedy(model)
        ids, cache, step = IDS, None, IDS
        for _ in range(6):
            out = model(step, past_key_values=cache, use_cache=True)
            cache, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, step], -1)
    assert torch.equal(ids, expected)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
@pytest.mark.parametrize("cached", [True, False])
def test_beams_follow_their_source_row(options, cached):
    """Steering row 1 alone leaves row 0 as it was, and gives row 1 what it gets when alone."""
    model, sae, kept = tiny("gpt2"), make_sae(), options.get("num_return_sequences", 1)
    options = options | {"use_cache": cached}
    bare = greedy(model, **options)
    with attach(model, sae, add(3, 5.0)):
        alone = greedy(model, IDS[1:], **options)
    with attach(model, sae, add(3, 5.0, rows=1)):
        both = greedy(model, **options)
    assert torch.equal(both[:kept], bare[:kept])
    assert torch.equal(both[kept:], alone)
    assert not torch.equal(both[kept:], bare[kept:])


def test_returned_sequences_follow_their_source_row():
    model, sae = tiny("gpt2"), make_sae()
    options = {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(0)
    bare = greedy(model, **options)
    with attach(model, sae, add(3, 500.0, rows=1)):  # a shift that no sampling can miss
        torch.manual_seed(0)
        steered = greedy(model, **options)
    assert torch.equal(steered[:3], bare[:3])
    assert not torch.equal(steered[3:], bare[3:])


@pytest.mark.parametrize("how", ["model", "lookup", "itself"])
def test_assisted_decoding_gives_the_same_tokens(how):
    model, sae = tiny("llama"), make_sae()
    edits = [add(3, 4.0, phase="generated"), scale(5, 2.0, positions=slice(0, -1)), add(6, 2.0)]
    assistant = {
        "model": {"assistant_model": copy.deepcopy(model)},
        "lookup": {"prompt_lookup_num_tokens": 2},
        "itself": {"assistant_model": model},
    }[how]
    with attach(model, sae, edits):
        expected = greedy(model, IDS[:1])
        assert torch.equal(greedy(model, IDS[:1], **assistant), expected)


def test_generation_continues_a_cache_with_its_own_positions():
    model, sae = tiny("llama"), make_sae()
    with attach(model, sae, add(3, 3.0, positions=slice(4, 9))):
        expected = greedy(model, LONG)
        cache = model(LONG[:, :10], use_cache=True).past_key_values
        assert torch.equal(greedy(model, LONG, past_key_values=cache), expected)


def test_prompt_embeddings_count_like_tokens():
    model, sae = tiny("llama"), make_sae()
    edits = [add(3, 3.0, phase="generated"), add(4, 3.0, positions=-1)]
    with attach(model, sae, edits):
        expected = greedy(model)[:, IDS.shape[1] :]
        embeds = model.get_input_embeddings()(IDS)
        mask = torch.ones_like(IDS)
        found = model.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=6, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    assert torch.equal(found, expected)


# -- continuous batching ---------------------------------------------------------------------------


@pytest.mark.slow
def test_generate_batch_is_steered_although_it_runs_in_another_thread():
    from transformers import GenerationConfig

    model, sae = copy.deepcopy(tiny("llama")), make_sae()
    prompts = [IDS[0].tolist(), IDS[1, :4].tolist()]
    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    edits = [add(3, 4.0), scale(5, 2.0), add(6, 3.0, positions=slice(3, None))]
    with attach(model, sae, edits) as attachment:
        expected = [greedy(model, torch.tensor([p]), tokens=5)[0, len(p) :] for p in prompts]
        outputs = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
        found = [torch.tensor(out.generated_tokens) for out in outputs.values()]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        for refused in (
            add(3, 1.0, rows=0),
            add(3, 1.0, phase="prompt"),
            add(3, 1.0, positions=-1),
        ):
            attachment.edits = refused
            with pytest.raises(ValueError, match="generate_batch packs"):
                model.generate_batch(inputs=prompts, generation_config=config)


# -- torch.compile ---------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


COMPILED = {"cache_implementation": "static", "tokens": 5}


def compiled(model, ids=IDS, **options):
    from transformers import CompileConfig

    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True  # on CPU too: the auto-compile of GPUs
    return greedy(model, ids, compile_config=config, **COMPILED, **options)


SELECTIVE = [
    add(3, 4.0, phase="generated"),
    scale(5, 2.0, positions=slice(1, -1)),
    add(6, 2.0, rows=1, when=active(7)),
    add_vector(torch.ones(HIDDEN), 0.1, positions=[2, 9]),
]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_static_cache_generation_is_never_half_steered(fresh_compiler, name):
    """Compiled before attach, while attached, with edits changed live, and after detach."""
    model, sae = copy.deepcopy(tiny(name)), make_sae()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    bare = greedy(model, attention_mask=mask, tokens=5)
    assert torch.equal(compiled(model, attention_mask=mask), bare)
    with attach(model, sae, add(3, 4.0)) as attachment:
        for edits in (add(3, 4.0), SELECTIVE, clamp(5, 6.0), ()):
            attachment.edits = edits
            expected = greedy(model, attention_mask=mask, tokens=5)
            assert torch.equal(compiled(model, attention_mask=mask), expected)
        attachment.splice = True
        assert torch.equal(
            compiled(model, attention_mask=mask), greedy(model, attention_mask=mask, tokens=5)
        )
    assert torch.equal(compiled(model, attention_mask=mask), bare)


@pytest.mark.parametrize("splice", [False, True])
@pytest.mark.parametrize("activation", ["topk", "jumprelu", "gated"])
def test_attached_before_compile_the_graph_holds_no_break(fresh_compiler, activation, splice):
    model, sae = copy.deepcopy(tiny("llama")), make_sae(activation=activation)
    edits = [add(3, 2.0), clamp(5, 1.0, positions=-1), scale(7, 2.0, rows=0, when=active(7))]
    with attach(model, sae, edits, splice=splice) as attachment:
        expected = logits(model, use_cache=False)
        code = attachment.codes["resid_post.1"].to_dense()
        graph = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(logits(graph, use_cache=False), expected)
        torch.testing.assert_close(attachment.codes["resid_post.1"].to_dense(), code)
        assert attachment.report()["resid_post.1"].tokens == 28  # counted inside the graph too


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_compiled_before_attach_is_steered_and_given_back(fresh_compiler, wrapped):
    model, sae = copy.deepcopy(tiny("gpt2")), make_sae()
    graph = torch.compile(model, backend="eager")
    bare = logits(graph, use_cache=False)
    with attach(model, sae, add(3, 2.0)):
        expected = logits(model, use_cache=False)
    with attach(graph if wrapped else model, sae, add(3, 2.0)) as attachment:
        torch.testing.assert_close(logits(graph, use_cache=False), expected)
        attachment.edits = ()
        torch.testing.assert_close(logits(graph, use_cache=False), bare)
    torch.testing.assert_close(logits(graph, use_cache=False), bare)


@pytest.mark.slow
def test_inductor_generates_the_same_tokens(fresh_compiler):
    from transformers import CompileConfig

    model, sae = copy.deepcopy(tiny("llama")), make_sae()
    config = CompileConfig(backend="inductor", mode="default", fullgraph=True)
    config._compile_all_devices = True
    with attach(model, sae, [add(3, 4.0), scale(5, 2.0)], splice=True):
        expected = greedy(model, tokens=5)
        assert torch.equal(greedy(model, compile_config=config, **COMPILED), expected)


# -- devices ---------------------------------------------------------------------------------------


def test_an_offloaded_model_is_edited_like_a_resident_one(tmp_path):
    from accelerate import cpu_offload, disk_offload

    sae, edits = make_sae(), [add(3, 2.0), scale(5, 2.0)]
    resident = tiny("llama")
    with attach(resident, sae, edits):
        expected = greedy(resident)
    for offload in (
        lambda m: cpu_offload(m, torch.device("cpu")),
        lambda m: disk_offload(m, tmp_path, torch.device("cpu")),
    ):
        model = offload(copy.deepcopy(resident))
        with attach(model, sae, edits):
            assert torch.equal(greedy(model), expected)
        assert torch.equal(greedy(model), greedy(resident))


def test_a_device_map_with_offload_is_honoured(tmp_path):
    from transformers import AutoModelForCausalLM

    sae, edits = make_sae(), [add(3, 2.0), scale(5, 2.0)]
    resident = tiny("llama")
    resident.save_pretrained(tmp_path / "model")
    with attach(resident, sae, edits):
        expected = greedy(resident)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.layers.2": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    with attach(model, sae, edits, splice=True), attach(resident, sae, edits, splice=True):
        assert torch.equal(greedy(model), greedy(resident))
    with attach(model, sae, edits):
        assert torch.equal(greedy(model), expected)


def test_a_quantised_model_keeps_its_hidden_dtype():
    model, sae = copy.deepcopy(tiny("llama")), make_sae()
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    x = stream(quantised, "resid_post.1")
    with attach(quantised, sae, add(3, 2.0)):
        torch.testing.assert_close(stream(quantised, "resid_post.1"), x + 2.0 * sae.W_dec[3])


# -- threads ---------------------------------------------------------------------------------------


def in_thread(act):
    caught = []

    def run():
        try:
            caught.append(act())
        except Exception as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return caught[0]


def test_a_second_thread_may_not_attach_while_the_first_is_attached():
    model, sae = tiny("gpt2"), make_sae()
    with attach(model, sae, add(3, 1.0)):
        steered = logits(model)
        refused = in_thread(lambda: attach(model, sae, add(4, 1.0)))
        assert isinstance(refused, RuntimeError) and "another thread" in str(refused)
        assert torch.equal(logits(model), steered)
    late = in_thread(lambda: attach(model, sae, add(4, 1.0)))
    late.detach()
    assert not hooks_of(model)


def test_two_threads_inside_one_pass_are_refused_and_the_first_is_unharmed():
    model, sae = copy.deepcopy(tiny("gpt2")), make_sae()
    inside, go = threading.Event(), threading.Event()

    def wait(module, args):
        inside.set()
        go.wait(30)

    with attach(model, sae, add(3, 1.0)):
        expected = logits(model)
        handle = model.transformer.h[2].register_forward_pre_hook(wait)
        first = []
        thread = threading.Thread(target=lambda: first.append(logits(model)))
        thread.start()
        assert inside.wait(30)
        with pytest.raises(RuntimeError, match="two threads are inside"):
            logits(model)
        go.set()
        thread.join(30)
        handle.remove()
        assert torch.equal(first[0], expected)
        assert torch.equal(logits(model), expected)


def test_models_in_two_threads_do_not_meet():
    models = [copy.deepcopy(tiny("gpt2")) for _ in range(2)]
    sae = make_sae()
    expected = []
    for model, amount in zip(models, (2.0, -2.0), strict=True):
        with attach(model, sae, add(3, amount)):
            expected.append(logits(model))
    found: dict[int, torch.Tensor] = {}

    def run(which, amount):
        with attach(models[which], make_sae(), add(3, amount)):
            for _ in range(5):
                found[which] = logits(models[which])
                time.sleep(0.002)

    threads = [threading.Thread(target=run, args=pair) for pair in ((0, 2.0), (1, -2.0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.equal(found[i], expected[i]) for i in range(2))


# -- moved() is about a plain pass; the same edit while generating ---------------------------------


def test_a_plain_pass_is_all_prompt():
    model, sae = tiny("gpt2"), make_sae()
    assert moved(model, sae, add(3, 1.0, phase="prompt")).all()
    assert not moved(model, sae, add(3, 1.0, phase="generated")).any()


# -- passes that end badly, and calls that generate does not prepare -------------------------------


def test_an_interrupted_pass_is_forgotten():
    """PyTorch runs no hooks on KeyboardInterrupt, so nothing says that the pass is over."""
    model, sae = copy.deepcopy(tiny("llama")), make_sae()
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])

    def interrupt(module, args):
        raise KeyboardInterrupt

    with attach(model, sae, add(3, 1.0, positions=0)) as attachment:
        expected = logits(model, attention_mask=mask)
        for broken in (lambda: logits(model), lambda: greedy(model)):
            handle = model.model.layers[2].register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                broken()
            handle.remove()
            assert torch.equal(logits(model, attention_mask=mask), expected)
        assert attachment.codes["resid_post.1"].l0()[0, :3].sum() == 0
        assert torch.equal(in_thread(lambda: logits(model, attention_mask=mask)), expected)


def test_a_second_thread_that_keeps_trying_never_gets_in():
    model, sae = copy.deepcopy(tiny("gpt2")), make_sae()
    inside, go, first = threading.Event(), threading.Event(), []

    def wait(module, args):
        inside.set()
        go.wait(30)

    with attach(model, sae, add(3, 1.0)):
        expected = logits(model)
        handle = model.transformer.h[0].register_forward_pre_hook(wait)
        thread = threading.Thread(target=lambda: first.append(logits(model)))
        thread.start()
        assert inside.wait(30)
        handle.remove()
        for _ in range(5):
            with pytest.raises(RuntimeError, match="two threads are inside"):
                logits(model, ids=IDS[:1, :3])
        go.set()
        thread.join(30)
        assert torch.equal(first[0], expected)


def test_guidance_passes_select_the_same_rows():
    model, sae = tiny("gpt2"), make_sae()
    options = {"do_sample": True, "num_return_sequences": 2, "guidance_scale": 1.5}
    clean, dirty, block = [], [], model.transformer.h[1]
    first = block.register_forward_hook(lambda m, a, out: clean.append(out))
    with attach(model, sae, add(3, 1.0, rows=1)):
        first.remove()
        first = block.register_forward_hook(lambda m, a, out: clean.append(out), prepend=True)
        last = block.register_forward_hook(lambda m, a, out: dirty.append(out))
        greedy(model, tokens=3, **options)
        first.remove()
        last.remove()
    pairs = [(_first(a), _first(b)) for a, b in zip(clean, dirty, strict=True)]
    assert len(pairs) == 6  # a conditional and an unconditional pass for each token
    for before, after in pairs:
        assert (before != after).any(-1).any(-1).tolist() == [False, False, True, True]


def _first(out):
    return out[0] if isinstance(out, tuple) else out


def test_a_head_that_sees_only_the_last_token_follows_rows_and_positions():
    model, sae = tiny("llama"), make_sae("lm_head:in")
    edits = [add(3, 5.0, rows=1), add(4, 5.0, positions=-1)]
    with attach(model, sae, edits):
        both = greedy(model, num_beams=2)
    with attach(model, sae, [edits[1]]):
        alone = greedy(model, num_beams=2)
    assert torch.equal(both[0], alone[0])


def test_rows_under_a_bare_backbone_inside_generate_are_refused():
    model, sae = tiny("llama"), make_sae()
    with (
        attach(model.model, sae, add(3, 1.0, rows=1)),
        pytest.raises(ValueError, match="attach to the model whose generate is called"),
    ):
        greedy(model, num_beams=2)


@pytest.mark.parametrize("how", ["two prompts", "two answers", "continued", "no cache"])
def test_rows_that_have_ended_are_padding(how):
    """transformers pads them and leaves their mask at 1."""
    from transformers import DynamicCache, LogitsProcessor

    class Scripted(LogitsProcessor):
        drawn = 0

        def __call__(self, input_ids, scores):
            self.drawn += 1
            ends = self.drawn == 2  # row 0, with its second token
            chosen = torch.tensor([[2 if ends else 10], [11]])
            return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

    model, sae = tiny("gpt2"), make_sae()
    options = {"eos_token_id": 2, "logits_processor": [Scripted()]}
    ids = IDS
    if how == "two answers":
        ids = IDS[:1]
        options |= {"num_return_sequences": 2, "do_sample": True}
    if how == "continued":
        options["past_key_values"] = DynamicCache(config=model.config)
        options["attention_mask"] = torch.ones_like(IDS)
    if how == "no cache":
        options["use_cache"] = False
    with attach(model, sae, record="last" if how == "no cache" else "all") as attachment:
        if how == "continued":
            model(IDS[:, :4], past_key_values=options["past_key_values"])
            ids = IDS[:, 4:]
        new = greedy(model, ids, **options)
    assert new[:, ids.shape[1] :].tolist() == [[10, 2, 0, 0, 0, 0], [11] * 6]
    active = attachment.codes["resid_post.1"].l0() > 0
    assert active.int().tolist() == [[1] * 9 + [0] * 3, [1] * 12]
    if how != "no cache":  # which sees tokens again and again
        assert attachment.report()["resid_post.1"].tokens == 9 + 12


@pytest.mark.parametrize("return_dict", [True, False])
def test_a_cache_keeps_its_prompt_however_the_output_is_returned(return_dict):
    from transformers import DynamicCache

    model, sae = tiny("gpt2"), make_sae()
    with attach(model, sae, add(3, 4.0, phase="generated")):
        expected = greedy(model)
        ids, cache, step = IDS, DynamicCache(), IDS
        for _ in range(6):
            out = model(step, past_key_values=cache, use_cache=True, return_dict=return_dict)
            step = out[0][:, -1:].argmax(-1)
            ids = torch.cat([ids, step], -1)
    assert torch.equal(ids, expected)


def test_a_cache_that_was_reset_starts_a_new_prompt():
    from transformers import StaticCache

    model, sae = tiny("llama"), make_sae()
    cache = StaticCache(config=model.config, max_cache_len=32)
    with attach(model, sae, add(3, 4.0, phase="generated")):
        expected = logits(model, ids=LONG)
        logits(model, ids=IDS, past_key_values=cache)
        cache.reset()
        found = logits(model, ids=LONG, past_key_values=cache)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_cache_that_cannot_be_noted_or_counted_does_not_break_the_pass():
    model, sae = tiny("mamba"), make_sae()
    with attach(model, sae) as attachment:
        out = model(IDS, use_cache=True)
        model(IDS[:, :1], cache_params=out.cache_params, use_cache=True)
        attachment.edits = add(3, 1.0, positions=2)
        with pytest.raises(ValueError, match="does not count the tokens"):
            model(IDS[:, :1], cache_params=out.cache_params, use_cache=True)


def test_a_nested_generation_of_another_prompt_has_its_own_prompt():
    from transformers import LogitsProcessor

    model, sae, found = tiny("gpt2"), make_sae(), []
    with attach(model, sae, add(3, 6.0, phase="generated")):
        alone = greedy(model, LONG)

        class Nested(LogitsProcessor):
            def __call__(self, input_ids, scores):
                if not found:
                    found.append(None)
                    found.append(greedy(model, LONG))
                return scores

        greedy(model, logits_processor=[Nested()])
    assert torch.equal(found[1], alone)


def test_broadcast_masks_count_every_row_and_masks_of_other_shapes_are_not_guessed():
    model, sae = tiny("llama"), make_sae()
    with attach(model, sae) as attachment:
        logits(model, attention_mask=torch.ones(1, 7, dtype=torch.long))
        assert attachment.report()["resid_post.1"].tokens == 14
        full = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
        logits(model, attention_mask=full)
        attachment.edits = add(3, 1.0, positions=0)
        with pytest.raises(ValueError, match="attention mask is not"):
            logits(model, attention_mask=full)
