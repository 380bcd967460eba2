"""The objectives by the names that `--objective` takes."""

from saert.train.objectives.base import Objective
from saert.train.objectives.topk import TopKObjective

OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective for objective in (TopKObjective,)
}
