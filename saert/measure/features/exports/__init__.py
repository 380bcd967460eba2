"""A feature index in the formats of other viewers."""

from saert.measure.features.exports.neuronpedia import to_neuronpedia
from saert.measure.features.exports.openai_viewer import to_openai_viewer
from saert.measure.features.exports.sae_dashboard import to_sae_dashboard

__all__ = ["to_neuronpedia", "to_openai_viewer", "to_sae_dashboard"]
