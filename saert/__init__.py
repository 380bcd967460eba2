"""Sparse autoencoders on live transformers: attach, observe, splice, steer, ablate.

>>> from saert import attach, add
>>> with attach(model, "bundled:resid_post.2", add(3, 8.0)):
...     model.generate(**inputs)
"""

from saert.activations import (
    AbsTopK,
    Activation,
    BatchTopK,
    Gated,
    GroupMax,
    JumpReLU,
    ReLU,
    TopK,
)
from saert.edits import ablate, active, add, add_vector, clamp, scale
from saert.hookpoint import Hookpoint, HookpointError, Location
from saert.hub.format import FormatError, save
from saert.hub.load import load, load_all
from saert.hub.publish import Published, publish
from saert.hub.verify import verify
from saert.hub.verifying.verification import Verification, VerificationError
from saert.measure.ablation.ablate import ablation_effects
from saert.measure.ablation.table import AblationEffects
from saert.measure.attribution.attribute import attribute
from saert.pursuit import MatchingPursuit
from saert.record import SAEReport
from saert.refine import Refinement, refine
from saert.runtime import Attachment, attach
from saert.sae import SAE
from saert.sharded import shard
from saert.sparse import SparseCode
from saert.twin import twin

__all__ = [
    "AblationEffects",
    "AbsTopK",
    "SAE",
    "Activation",
    "Attachment",
    "BatchTopK",
    "FormatError",
    "Gated",
    "GroupMax",
    "Hookpoint",
    "HookpointError",
    "JumpReLU",
    "Location",
    "MatchingPursuit",
    "Published",
    "ReLU",
    "Refinement",
    "SAEReport",
    "SparseCode",
    "TopK",
    "Verification",
    "VerificationError",
    "ablate",
    "ablation_effects",
    "active",
    "add",
    "add_vector",
    "attach",
    "attribute",
    "clamp",
    "load",
    "load_all",
    "publish",
    "refine",
    "save",
    "scale",
    "shard",
    "twin",
    "verify",
]
__version__ = "0.1.0"
