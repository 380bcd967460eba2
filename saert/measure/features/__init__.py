"""What every latent fires on: an index on disk, cards read from it, exports for other viewers."""

from saert.measure.features.build import feature_index
from saert.measure.features.cards import Band, Card, Example, Logit, Selection
from saert.measure.features.exports import to_neuronpedia, to_openai_viewer, to_sae_dashboard
from saert.measure.features.index import FeatureIndex, Found

__all__ = [
    "Band",
    "Card",
    "Example",
    "FeatureIndex",
    "Found",
    "Logit",
    "Selection",
    "feature_index",
    "to_neuronpedia",
    "to_openai_viewer",
    "to_sae_dashboard",
]
