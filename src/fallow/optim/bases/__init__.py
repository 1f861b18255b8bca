"""Where the states of a low-rank optimizer live: which r of the d directions of each matrix."""

from fallow.optim.bases.basis import Basis
from fallow.optim.bases.coordinates import Block, Coordinates, Entries
from fallow.optim.bases.cosine import Cosine
from fallow.optim.bases.decomposed import SVD, Gram, Randomised, Warm
from fallow.optim.bases.random import Gaussian, Random
from fallow.optim.bases.two_sided import TwoSided

BASES: dict[str, type[Basis]] = {
    kind.name: kind
    for kind in (SVD, Randomised, Warm, Gram, Cosine, Random, Gaussian, Coordinates, Entries, Block, TwoSided)
}
