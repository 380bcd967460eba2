"""What an SAE is worth: effects of ablation, attribution, reconstruction, probes, explanations."""

from saert.measure.ablation import ablation_effects, direction_effects
from saert.measure.ablation_table import AblationEffects
from saert.measure.agreement import Agreement, attribution_agreement
from saert.measure.attribution import Attribution, attribute
from saert.measure.compute import LossLaw, compute_equivalent, fit_losses
from saert.measure.consistency import (
    Consistency,
    FeatureSplitting,
    consistency,
    feature_splitting,
)
from saert.measure.downstream import DownstreamReport, downstream_report
from saert.measure.explaining import explain, neutral_token
from saert.measure.explanation_splice import ExplanationLoss, explanation_loss
from saert.measure.explanations import Explanation, Explanations
from saert.measure.features import FeatureIndex, feature_index
from saert.measure.metric import Metric, logit_difference, next_token_loss
from saert.measure.probe_results import Probe, Probes
from saert.measure.probing import sparse_probe
from saert.measure.reconstruction import ReconstructionReport, reconstruction_report
from saert.measure.suites import Suite, probe_suite, probe_task, read_suite
from saert.measure.transfer import TransferReport, transfer_report

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
