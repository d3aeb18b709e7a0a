"""The herbarium: pictures of leaves that the project draws itself, for the demo, the tests and the benchmarks.

Any number of species (up to `MAX_SPECIES`), any picture size, long-tailed counts. Picture k of species s is a function of
(seed, s, k, size) alone: never of how many others are drawn, nor in which order or by how many workers.
"""

from aplantida_dist.herbarium.collection import draw_herbarium
from aplantida_dist.herbarium.names import MAX_SPECIES
from aplantida_dist.herbarium.picture import draw_leaf, encode_jpeg
from aplantida_dist.herbarium.species import Species, make_species

__all__ = ["MAX_SPECIES", "Species", "draw_herbarium", "draw_leaf", "encode_jpeg", "make_species"]
