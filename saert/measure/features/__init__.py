"""What every latent fires on: an index on disk, cards read from it, exports for other viewers."""

from saert.measure.features.build import feature_index
from saert.measure.features.cards import Band, Card, Example, Logit, Selection
from saert.measure.features.direction import Direction, direction
from saert.measure.features.exports import to_neuronpedia, to_openai_viewer, to_sae_dashboard
from saert.measure.features.index import FeatureIndex
from saert.measure.features.look import Look, look
from saert.measure.features.names import automatic_name
from saert.measure.features.own import cache_folder, own_index, own_rows, specials
from saert.measure.features.searching import Found

__all__ = [
    "Band",
    "Card",
    "Direction",
    "Example",
    "FeatureIndex",
    "Found",
    "Logit",
    "Look",
    "Selection",
    "automatic_name",
    "cache_folder",
    "direction",
    "feature_index",
    "look",
    "own_index",
    "own_rows",
    "specials",
    "to_neuronpedia",
    "to_openai_viewer",
    "to_sae_dashboard",
]
