"""What an SAE is worth: effects of ablation, attribution, reconstruction, probes, explanations."""

from saert.measure.ablation.ablate import ablation_effects, direction_effects
from saert.measure.ablation.table import AblationEffects
from saert.measure.attribution.agreement import Agreement, attribution_agreement
from saert.measure.attribution.attribute import Attribution, attribute
from saert.measure.attribution.metric import Metric, logit_difference, next_token_loss
from saert.measure.features import FeatureIndex, feature_index
from saert.measure.matching.consistency import (
    Consistency,
    FeatureSplitting,
    consistency,
    feature_splitting,
)
from saert.measure.n2g.explain import explain, neutral_token
from saert.measure.n2g.explanations import Explanation, Explanations
from saert.measure.n2g.splice import ExplanationLoss, explanation_loss
from saert.measure.probes.probing import sparse_probe
from saert.measure.probes.results import Probe, Probes
from saert.measure.probes.suites import Suite, probe_suite, probe_task, read_suite
from saert.measure.reports.compute import LossLaw, compute_equivalent, fit_losses
from saert.measure.reports.downstream import DownstreamReport, downstream_report
from saert.measure.reports.reconstruction import ReconstructionReport, reconstruction_report
from saert.measure.reports.transfer import TransferReport, transfer_report

__all__ = [
    "AblationEffects",
    "Agreement",
    "Attribution",
    "Consistency",
    "DownstreamReport",
    "Explanation",
    "ExplanationLoss",
    "Explanations",
    "FeatureIndex",
    "FeatureSplitting",
    "LossLaw",
    "Metric",
    "Probe",
    "Probes",
    "ReconstructionReport",
    "Suite",
    "TransferReport",
    "ablation_effects",
    "attribute",
    "attribution_agreement",
    "compute_equivalent",
    "consistency",
    "downstream_report",
    "explain",
    "explanation_loss",
    "feature_index",
    "feature_splitting",
    "fit_losses",
    "direction_effects",
    "logit_difference",
    "neutral_token",
    "next_token_loss",
    "probe_suite",
    "probe_task",
    "read_suite",
    "reconstruction_report",
    "sparse_probe",
    "transfer_report",
]
