"""The streams of activations, on one process and on several, and their cache on disk."""

import json
import os
import threading
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors import SafetensorError
from tiny_models import HIDDEN, tiny
from torch.nn import functional as F

from saert.capture import capture
from saert.hookpoint import Hookpoint
from saert.train import cache as cache_module
from saert.train.cache import Cache, CacheError
from saert.train.downstream import gradients
from saert.train.mesh import Mesh
from saert.train.row_stream import RowStream
from saert.train.stream import ActivationStream, StreamConfig, rows_per_buffer

CONTEXT, LANES = 16, 4
CONFIG = StreamConfig(batch_tokens=32, buffer_tokens=256, forward_rows=3, lanes=LANES)
SITES = [Hookpoint.parse(s) for s in ("resid_post.0", "mlp_in.1", "mlp_out.2")]
BOS, EOS = 1, 2


class Rows:
    """Row r is a function of r: BOS, then random ids, every eighth of them EOS."""

    def __init__(self, seed=0):
        self.seed, self.at, self.taken = seed, 0, 0

    def take(self, n):
        draw = [
            torch.randint(3, 97, (CONTEXT,), generator=torch.Generator().manual_seed(r))
            for r in range(self.seed + self.at, self.seed + self.at + n)
        ]
        self.at, self.taken = self.at + n, self.taken + n
        rows = torch.stack(draw)
        rows[rows % 8 == 0] = EOS
        rows[:, 0] = BOS
        return rows

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def special(rows):
    return rows < 3


@pytest.fixture(scope="module")
def model():
    return tiny("gpt2").requires_grad_(False)


def a_stream(model, config=CONFIG, rows=None, sites=SITES, **options):
    source = Rows() if rows is None else rows
    return ActivationStream(
        lambda: model, source, sites, CONTEXT, config, special=special, **options
    )


def batches(stream, n):
    return [stream.next().x for _ in range(n)]


def same(a, b):
    """Bit for bit: lists of batches."""
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[site].cpu(), other[site].cpu()) for site in one)


def differ(a, b):
    return not any(torch.equal(x[SITES[0]], y[SITES[0]]) for x, y in zip(a, b, strict=True))


def keys(x):
    return [row.numpy().tobytes() for row in x.cpu()]


def buffer_rows(number, config=CONFIG):
    count, rows = rows_per_buffer(config, CONTEXT), Rows()
    rows.at = number * count
    return rows.take(count)


# -- batches ------------------------------------------------------------------------------------


def test_a_batch_holds_the_same_tokens_at_every_hookpoint_as_a_direct_capture(model):
    stream = a_stream(model)
    for number in range(2):
        whole = capture(model, buffer_rows(number), SITES, CONFIG.forward_rows)
        triples = Counter(zip(*(keys(whole[s]) for s in SITES), strict=True))
        while stream.number == number:
            served = stream.next().x
            assert all(served[s].shape == (32, HIDDEN) for s in SITES)
            assert not Counter(zip(*(keys(served[s]) for s in SITES), strict=True)) - triples


def test_a_usable_token_is_served_at_most_once_and_almost_all_are(model):
    stream = a_stream(model)
    rows = buffer_rows(0)
    whole = capture(model, rows, SITES, CONFIG.forward_rows)[SITES[1]]
    usable = Counter(keys(whole[~special(rows).flatten()]))
    specials = set(keys(whole[special(rows).flatten()]))
    served = Counter()
    while stream.number == 0:
        served.update(keys(stream.next().x[SITES[1]]))
    assert not served - usable
    assert not specials & set(served)
    # what the shortest lane cannot fill is left
    lanes = (~special(rows)).view(-1, LANES, CONTEXT).sum((0, 2))
    assert served.total() == lanes.min() // 8 * 32
    assert served.total() > 0.8 * usable.total()


def test_special_tokens_are_served_if_asked_for(model):
    config = replace(CONFIG, exclude_special=False)
    rows = buffer_rows(0, config)
    whole = capture(model, rows, SITES, CONFIG.forward_rows)[SITES[1]]
    stream = a_stream(model, config)
    served = Counter()
    while stream.number == 0:
        served.update(keys(stream.next().x[SITES[1]]))
    assert served == Counter(keys(whole))


def test_every_batch_takes_equally_many_tokens_from_each_lane(model):
    stream = a_stream(model)
    whole = capture(model, buffer_rows(0), SITES, CONFIG.forward_rows)[SITES[1]]
    lane = {key: token // CONTEXT % LANES for token, key in enumerate(keys(whole))}
    found = [lane[key] for key in keys(stream.next().x[SITES[1]])]
    assert found == [i for i in range(LANES) for _ in range(8)]


def test_a_batch_is_a_function_of_text_and_seed(model):
    first = batches(a_stream(model), 20)
    same(first, batches(a_stream(model), 20))
    assert differ(first, batches(a_stream(model, seed=1), 20))
    assert differ(first, batches(a_stream(model, rows=Rows(seed=1000)), 20))


def test_two_buffers_are_shuffled_differently(model):
    class Same(Rows):
        def take(self, n):
            self.at = 0
            return super().take(n)

    stream = a_stream(model, rows=Same())
    first = []
    while stream.number == 0:
        first += keys(stream.next().x[SITES[1]])
    second = []
    while stream.number == 1:
        second += keys(stream.next().x[SITES[1]])
    assert len(set(first) & set(second)) > 0.8 * len(set(first)) and first != second


@pytest.mark.parametrize("stop", [*range(0, 14), 20])
def test_a_saved_position_gives_the_identical_batches(model, stop):
    stream = a_stream(model)
    batches(stream, stop)
    state = json.loads(json.dumps(stream.state_dict()))
    expected = batches(stream, 8)
    resumed = a_stream(model)
    batches(resumed, (stop * 7) % 5)  # wherever it was before
    resumed.load_state_dict(state)
    same(expected, batches(resumed, 8))
    assert resumed.state_dict() == stream.state_dict()


@pytest.mark.parametrize("stop", range(0, 14))
def test_a_sample_does_not_move_the_stream(model, stop):
    stream, plain = a_stream(model), a_stream(model)
    batches(stream, stop), batches(plain, stop)
    state = stream.state_dict()
    first, again = stream.sample(40), stream.sample(40)
    same([first], [again])
    assert first[SITES[0]].shape == (40, HIDDEN)
    assert stream.state_dict() == state == plain.state_dict()
    resumed = a_stream(model)
    resumed.load_state_dict(state)
    same([first], [resumed.sample(40)])
    same(batches(plain, 8), batches(stream, 8))


def test_a_sample_has_usable_tokens_only_and_no_more_than_a_buffer(model):
    rows = buffer_rows(0)
    whole = capture(model, rows, SITES, CONFIG.forward_rows)[SITES[1]]
    usable = Counter(keys(whole[~special(rows).flatten()]))
    found = a_stream(model).sample(10**6)[SITES[1]]
    assert not Counter(keys(found)) - usable and len(found) > 0.8 * usable.total()


def test_max_norm_leaves_out_planted_outliers_and_nothing_else(model):
    class HalfSpecial(Rows):
        def take(self, n):
            return torch.where(torch.arange(CONTEXT) < 9, EOS, super().take(n))

    rows = HalfSpecial().take(rows_per_buffer(CONFIG, CONTEXT))
    usable = ~special(rows).flatten()
    site = SITES[1]
    norms = capture(model, rows, SITES, CONFIG.forward_rows)[site].norm(dim=-1)
    assert norms[usable].max() < 3 * norms[usable].median()
    planted = usable.nonzero()[[3, 50, 70]].squeeze(-1)
    stream = a_stream(model, replace(CONFIG, max_norm=3.0), rows=HalfSpecial())
    run = stream._run

    def plant(own):
        tensors = run(own)
        tensors[str(site)][planted] *= 4 * norms[usable].median() / norms[planted][:, None]
        tensors[str(site)][~usable] *= 1e6  # special tokens do not move the median
        return tensors

    stream._run = plant
    stream.next()
    left = usable.clone()
    left[planted] = False
    served = torch.zeros_like(usable)
    for lane in stream.buffer.lanes:
        served[lane] = True
    assert torch.equal(served, left)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch_tokens": 30}, "4 lanes do not divide batch_tokens 30"),
        ({"batch_tokens": 2}, "4 lanes do not divide batch_tokens 2"),
        ({"buffer_tokens": 63}, "buffer_tokens 63 must be at least two batches of 32"),
        ({"max_norm": 1.0}, "max_norm is 1.0, expected above 1"),
        ({"lanes": 0}, "lanes 0 and forward_rows 3 must be at least 1"),
        ({"forward_rows": 0}, "lanes 4 and forward_rows 0 must be at least 1"),
    ],
)
def test_settings_that_make_no_batch_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **settings)


def test_a_buffer_with_too_few_usable_tokens_is_an_error_that_says_so(model):
    class OnlySpecial(Rows):
        def take(self, n):
            return torch.where(torch.arange(CONTEXT) < 15, EOS, super().take(n))

    stream = a_stream(model, rows=OnlySpecial())
    with pytest.raises(ValueError, match="buffer 0 has . usable tokens in a lane, but a .* 8"):
        stream.next()


def test_gradients_are_those_of_the_same_tokens(model):
    stream = a_stream(model, wants_gradient=True)
    pairs = gradients(model, buffer_rows(0), SITES, CONFIG.forward_rows)
    served = stream.next()
    for site in SITES:
        x, g = pairs[site]
        where = dict(zip(keys(x), g, strict=True))
        expected = torch.stack([where[key] for key in keys(served.x[site])])
        assert torch.equal(served.gradient[site], expected)
        assert expected.abs().max() > 0
    assert a_stream(model).next().gradient == {}


# -- several processes --------------------------------------------------------------------------


class Together:
    """What processes exchange, here threads."""

    def __init__(self, world):
        self.barrier, self.slots = threading.Barrier(world), [None] * world

    def exchange(self, rank, value):
        self.slots[rank] = value
        self.barrier.wait(60)
        found = list(self.slots)
        self.barrier.wait(60)
        return found


@dataclass(frozen=True)
class ThreadMesh(Mesh):
    together: Together = None

    @property
    def rank(self):
        return self.replica * self.shards + self.shard

    def least(self, number):
        return min(self.together.exchange(self.rank, number))

    def wait(self):
        self.together.exchange(self.rank, None)

    def gather_tokens(self, x):
        found = self.together.exchange(self.rank, x)
        return torch.cat([found[r * self.shards + self.shard] for r in range(self.replicas)])

    def gather_latents(self, x, dim=-1):
        found = self.together.exchange(self.rank, x)
        first = self.replica * self.shards
        return torch.cat(found[first : first + self.shards], dim)


def in_parallel(shards, replicas, work):
    """work(mesh, model) on every rank of a mesh, each a thread with a model of its own."""
    together = Together(shards * replicas)
    meshes = [
        ThreadMesh(shards, replicas, s, r, None, together)
        for r in range(replicas)
        for s in range(shards)
    ]
    models = [tiny("gpt2").requires_grad_(False) for _ in meshes]
    found, failed = [None] * len(meshes), []

    def one(i):
        try:
            found[i] = work(meshes[i], models[i])
        except BaseException as error:
            failed.append(error)
            together.barrier.abort()

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(meshes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    broken = [e for e in failed if not isinstance(e, threading.BrokenBarrierError)]
    if failed:
        raise (broken or failed)[0]
    return found


# a row a pass, so that a token's numbers do not depend on the rows beside it
ALONE = replace(CONFIG, forward_rows=1, max_norm=1.2)


@pytest.mark.parametrize("shards, replicas", [(1, 2), (1, 4), (2, 1), (2, 2)])
def test_the_replicas_batches_one_after_the_other_are_those_of_one_process(shards, replicas, model):
    def work(mesh, own_model):
        stream = a_stream(own_model, ALONE, mesh=mesh)
        samples = stream.sample(40), stream.sample(10**6)
        found = batches(stream, 15)
        return samples, found, stream.state_dict()

    stream = a_stream(model, ALONE)
    samples, alone = (stream.sample(40), stream.sample(10**6)), batches(stream, 15)
    found = in_parallel(shards, replicas, work)
    for rank in found:
        same(samples, rank[0])
        assert rank[2] == stream.state_dict()
    for shard in range(shards):
        parts = [found[r * shards + shard][1] for r in range(replicas)]
        union = [
            {site: torch.cat([part[i][site] for part in parts]) for site in SITES}
            for i in range(15)
        ]
        same(alone, union)


def test_replicas_that_do_not_divide_the_lanes_are_refused(model):
    with pytest.raises(ValueError, match="3 replicas do not divide 4 lanes; set stream.lanes"):
        a_stream(model, mesh=Mesh(replicas=3))


# -- rows ---------------------------------------------------------------------------------------


def a_row_stream(model, mesh=None, **settings):
    config = replace(CONFIG, **({"batch_tokens": 64, "forward_rows": 1} | settings))
    return RowStream(lambda: model, Rows(), SITES, CONTEXT, config, mesh)


def plain_kl(model, rows, layer, new, mask):
    """Σ KL over all positions but each row's last, with new at block `layer` where mask."""
    with torch.no_grad():
        clean = model(rows).logits[:, :-1].log_softmax(-1)

    def splice(module, args, out):
        several = isinstance(out, tuple)
        hidden = out[0] if several else out
        hidden = torch.where(mask.view(*rows.shape, 1), new.view(*rows.shape, -1), hidden)
        return (hidden, *out[1:]) if several else hidden

    handle = model.transformer.h[layer].register_forward_hook(splice)
    try:
        spliced = model(rows).logits[:, :-1].log_softmax(-1)
    finally:
        handle.remove()
    return F.kl_div(spliced, clean, log_target=True, reduction="none").sum()


def test_rows_are_served_in_order_without_their_first_position(model):
    stream = a_row_stream(model)
    rows = Rows()
    for _ in range(3):
        served = stream.next()
        whole = capture(model, rows.take(4), SITES, 1)
        for site in SITES:
            expected = whole[site].view(4, CONTEXT, -1)[:, 1:].flatten(0, 1)
            assert torch.equal(served.x[site], expected)
    everything = a_row_stream(model, exclude_special=False).next().x[SITES[0]]
    assert torch.equal(everything, capture(model, Rows().take(4), SITES, 1)[SITES[0]])


@pytest.mark.parametrize("exclude", [True, False])
def test_the_splice_is_the_mean_kl_of_running_the_model_on_the_reconstruction(model, exclude):
    served = a_row_stream(model, exclude_special=exclude).next()
    rows, site = Rows().take(4), SITES[0]
    assert served.downstream(site, served.x[site]).item() == pytest.approx(0, abs=1e-5)
    estimate = (served.x[site] + 0.3 * torch.randn_like(served.x[site])).requires_grad_()
    share = served.downstream(site, estimate)
    mask = torch.ones(4, CONTEXT, dtype=torch.bool)
    mask[:, 0] = not exclude
    copy = estimate.detach().clone().requires_grad_()
    new = torch.zeros(4 * CONTEXT, HIDDEN).masked_scatter(mask.flatten()[:, None], copy)
    expected = plain_kl(model, rows, 0, new, mask) / (4 * (CONTEXT - 1))
    assert expected > 1e-3
    torch.testing.assert_close(share, expected, rtol=1e-4, atol=1e-6)
    ours, plain = torch.autograd.grad(share, estimate), torch.autograd.grad(expected, copy)
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-3, atol=1e-6)


def test_the_replicas_shares_of_the_kl_add_up(model):
    noise = 0.3 * torch.randn(4 * (CONTEXT - 1), HIDDEN)

    def work(mesh, own_model):
        served = a_row_stream(own_model, mesh).next()
        x = served.x[SITES[0]]
        own = noise.chunk(mesh.replicas)[mesh.replica]
        return x, served.downstream(SITES[0], x + own)

    found = in_parallel(1, 2, work)
    alone = a_row_stream(model).next()
    x = alone.x[SITES[0]]
    assert torch.equal(x, torch.cat([part for part, _ in found]))
    share = sum(part for _, part in found)
    torch.testing.assert_close(share, alone.downstream(SITES[0], x + noise))


@pytest.mark.parametrize("stop", [0, 1, 5])
def test_a_row_stream_resumes_and_samples_without_moving(model, stop):
    stream = a_row_stream(model)
    batches(stream, stop)
    state = json.loads(json.dumps(stream.state_dict()))
    sample = stream.sample(100)
    assert sample[SITES[0]].shape == (100, HIDDEN)
    expected = batches(stream, 3)
    assert torch.equal(sample[SITES[0]][:60], expected[0][SITES[0]])
    resumed = a_row_stream(model)
    resumed.load_state_dict(state)
    same(expected, batches(resumed, 3))


def test_a_batch_of_no_whole_row_is_refused(model):
    with pytest.raises(ValueError, match="batch_tokens 12 are 0 rows of 16"):
        a_row_stream(model, batch_tokens=12)
    with pytest.raises(ValueError, match="are 3 rows of 16; expected a positive multiple of the 2"):
        a_row_stream(model, Mesh(replicas=2), batch_tokens=48)


# -- the cache ----------------------------------------------------------------------------------

FACTS = {"model": {"name": "tiny"}, "context": CONTEXT, "hookpoints": [str(s) for s in SITES]}
BUFFER = rows_per_buffer(CONFIG, CONTEXT) * CONTEXT * (len(SITES) * HIDDEN * 4 + 1)  # bytes of one


def a_cache(folder, gigabytes=1.0, facts=FACTS):
    return Cache(folder, gigabytes, facts, CONTEXT)


class Forbidden:
    """A model that nobody may ask for."""

    def __call__(self):
        raise AssertionError("the model was called")


def through(model, folder, gigabytes=1.0, n=20, rows=None, **options):
    """n batches through a cache; model None: it must not be needed."""
    stream = a_stream(model, rows=rows, cache=a_cache(folder, gigabytes), **options)
    if model is None:
        stream.model = Forbidden()
    return batches(stream, n)


def test_a_cache_changes_no_number_and_spares_the_model(model, tmp_path):
    plain = batches(a_stream(model), 20)
    same(plain, through(model, tmp_path))
    rows = Rows()
    same(plain, through(None, tmp_path, rows=rows))
    assert rows.taken == 0
    same(batches(a_stream(model, seed=3), 20), through(None, tmp_path, seed=3))


def test_a_position_saved_with_a_cache_resumes_without_and_the_other_way(model, tmp_path):
    expected = batches(a_stream(model), 20)
    through(model, tmp_path)
    for first, then in ((a_cache(tmp_path), None), (None, a_cache(tmp_path))):
        stream = a_stream(model, cache=first)
        batches(stream, 9)
        state = json.loads(json.dumps(stream.state_dict()))
        resumed = a_stream(model, cache=then)
        resumed.load_state_dict(state)
        same(expected[9:], batches(resumed, 11))


@pytest.mark.parametrize("buffers", [0, 1, 2])
def test_a_full_cache_keeps_its_limit_and_the_numbers(model, tmp_path, buffers):
    plain = batches(a_stream(model), 24)
    limit = (buffers + 0.5) * BUFFER / 1e9
    same(plain, through(model, tmp_path, limit, 24))
    assert len(list(tmp_path.glob("0*.json"))) == buffers
    assert sum(p.stat().st_size for p in tmp_path.glob("*.safetensors")) <= limit * 1e9
    same(plain, through(model, tmp_path, limit, 24))
    same(plain, through(model, tmp_path, 1.0, 24))  # goes on where it was full
    same(plain, through(None, tmp_path, 1.0, 24))


def test_the_files_headers_count_as_well(model, tmp_path):
    def size(folder):
        return sum(p.stat().st_size for p in folder.glob("*.safetensors"))

    through(model, tmp_path / "all", n=8)
    limit = size(tmp_path / "all") - 1
    through(model, tmp_path / "less", limit / 1e9, n=8)
    assert 0 < size(tmp_path / "less") <= limit


def test_a_damaged_buffer_of_a_full_cache_is_written_again(model, tmp_path):
    limit = 1.5 * BUFFER / 1e9
    plain = through(model, tmp_path, limit, n=6)
    path = tmp_path / "000000-lane1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    same(plain, through(model, tmp_path, limit, n=6))
    same(plain, through(None, tmp_path, limit, n=6))


@pytest.mark.parametrize("name", ["000001-lane2.safetensors", "000000-lane0.safetensors"])
@pytest.mark.parametrize("where", [5, 200, -1])
def test_a_flipped_byte_is_noticed_and_the_buffer_computed_again(model, tmp_path, name, where):
    plain = through(model, tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[where] ^= 4
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AssertionError, match="the model was called"):
        through(None, tmp_path)
    same(plain, through(model, tmp_path))
    same(plain, through(None, tmp_path))


def test_no_flipped_byte_of_a_manifest_changes_a_number(model, tmp_path):
    plain = through(model, tmp_path, n=14)
    path = tmp_path / "000000.json"
    content = path.read_bytes()
    for where in range(0, len(content), 17):
        for bit in (1, 128):
            damaged = bytearray(content)
            damaged[where] ^= bit
            path.write_bytes(damaged)
            assert a_cache(tmp_path).get(0, range(LANES)) is None, bytes(damaged)
    same(plain, through(model, tmp_path, n=14))
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b'{"files": {', b"{}", b"[]", b"7", b"\xff\xfe"])
def test_a_damaged_manifest_and_leftovers_do_no_harm(model, tmp_path, content):
    plain = through(model, tmp_path)
    (tmp_path / "000000.json").write_bytes(content)
    (tmp_path / "000001-lane0.partial").write_bytes(b"half")
    (tmp_path / "000000.json.partial").write_bytes(b"half")
    (tmp_path / "000001-lane1.safetensors").unlink()
    same(plain, through(model, tmp_path))
    same(plain, through(None, tmp_path))


@pytest.mark.parametrize("after", range(6))
def test_a_write_that_was_cut_between_two_files_is_made_up_for(model, tmp_path, monkeypatch, after):
    plain = batches(a_stream(model), 14)
    count = iter(range(100))
    move = os.replace

    def cut(old, new):
        if next(count) >= after + 1:  # cache.json is the first
            raise KeyboardInterrupt
        move(old, new)

    monkeypatch.setattr(cache_module.os, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        through(model, tmp_path, n=14)
    monkeypatch.undo()
    same(plain, through(model, tmp_path, n=14))
    same(plain, through(None, tmp_path, n=14))


@pytest.mark.parametrize(
    "error",
    [OSError(28, "full"), SafetensorError("I/O error: No space left on device (os error 28)")],
)
def test_a_full_disk_is_a_full_cache(model, tmp_path, monkeypatch, error):
    plain = batches(a_stream(model), 14)

    def full(*_):
        raise error

    cache = a_cache(tmp_path)
    monkeypatch.setattr(cache_module, "save_file", full)
    same(plain, batches(a_stream(model, cache=cache), 14))
    assert cache.full and not list(tmp_path.glob("0*.json"))


def test_a_cache_of_other_activations_is_refused_by_name(model, tmp_path):
    through(model, tmp_path)
    with pytest.raises(CacheError, match="model = {'name': 'tiny'}, this run has {'name': 'big'}"):
        a_cache(tmp_path, facts=FACTS | {"model": {"name": "big"}})
    with pytest.raises(CacheError, match="made with context = 16, this run has 32"):
        a_cache(tmp_path, facts=FACTS | {"context": 32})
    with pytest.raises(CacheError, match="has no hookpoint resid_post.1, only resid_post.0, mlp_i"):
        a_cache(tmp_path, facts=FACTS | {"hookpoints": ["resid_post.1", str(SITES[0])]})
    with pytest.raises(CacheError, match="made with new = None, this run has 1"):
        a_cache(tmp_path, facts=FACTS | {"new": 1})


def test_a_cache_with_more_hookpoints_than_asked_for_will_do(model, tmp_path):
    through(model, tmp_path)
    few = [SITES[2]]
    cache = a_cache(tmp_path, facts=FACTS | {"hookpoints": [str(SITES[2])]})
    stream = a_stream(model, sites=few, cache=cache)
    stream.model = Forbidden()
    same(batches(a_stream(model, sites=few), 14), batches(stream, 14))


def test_gradients_are_cached_too(model, tmp_path):
    def served(model, cache):
        stream = a_stream(model, wants_gradient=True, cache=cache)
        if model is None:
            stream.model = Forbidden()
        return [stream.next().gradient for _ in range(8)]

    plain = served(model, None)
    same(plain, served(model, a_cache(tmp_path)))
    same(plain, served(None, a_cache(tmp_path)))


@pytest.mark.parametrize("shards, replicas", [(1, 2), (2, 2)])
def test_a_cache_may_be_written_and_read_by_other_numbers_of_processes(
    shards, replicas, model, tmp_path, monkeypatch
):
    local = threading.local()

    def gather(everyone, mine):
        everyone[:] = local.mesh.together.exchange(local.mesh.rank, mine)

    monkeypatch.setattr(cache_module.dist, "all_gather_object", gather)

    def work(mesh, own_model):
        local.mesh = mesh
        return batches(a_stream(own_model, ALONE, mesh=mesh, cache=a_cache(tmp_path / "a")), 14)

    plain = batches(a_stream(model, ALONE), 14)
    (tmp_path / "a").mkdir()
    a_cache(tmp_path / "a")
    written = in_parallel(shards, replicas, work)
    stream = a_stream(None, ALONE, cache=a_cache(tmp_path / "a"))
    stream.model = Forbidden()
    same(plain, batches(stream, 14))
    monkeypatch.setattr(cache_module, "save_file", None)  # all is there
    for first, again in zip(written, in_parallel(shards, replicas, work), strict=True):
        same(first, again)
