"""The objectives by the names that `--objective` takes."""

from saert.train.objectives.atm import ATMObjective
from saert.train.objectives.base import Objective
from saert.train.objectives.batch_topk import BatchTopKObjective
from saert.train.objectives.end_to_end import EndToEndObjective
from saert.train.objectives.feature_choice import FeatureChoiceObjective
from saert.train.objectives.gated import GatedObjective
from saert.train.objectives.gradient import GradientObjective
from saert.train.objectives.jumprelu import JumpReLUObjective
from saert.train.objectives.llama_scope import LlamaScopeObjective
from saert.train.objectives.matryoshka import MatryoshkaObjective
from saert.train.objectives.mutual_choice import MutualChoiceObjective
from saert.train.objectives.relu_l1 import ReLUL1Objective
from saert.train.objectives.topk import TopKObjective

OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective
    for objective in (
        TopKObjective,
        BatchTopKObjective,
        MatryoshkaObjective,
        MutualChoiceObjective,
        FeatureChoiceObjective,
        ReLUL1Objective,
        GatedObjective,
        JumpReLUObjective,
        LlamaScopeObjective,
        GradientObjective,
        ATMObjective,
        EndToEndObjective,
    )
}
