"""What a collector wrote beside a picture: species, place, licence and whom to thank. All of it is invented."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aplantida_dist.herbarium.species import Species
from aplantida_dist.seeds import derive

_COUNTRIES = {
    "EU_SW": ("ES", "PT", "FR", "IT"),
    "EU_NW": ("GB", "IE", "NL", "BE"),
    "EU_C": ("DE", "AT", "CH", "CZ", "PL"),
    "EU_N": ("SE", "NO", "FI", "DK"),
    "EU_E": ("RO", "BG", "UA", "HU"),
    "NA_E": ("US", "CA"),
    "NA_W": ("US", "CA", "MX"),
}
_REGIONS = tuple(_COUNTRIES)
_AT_HOME = 0.6
"""The share of a species' pictures that comes from its home region."""

_LICENSES = {
    "cc-by-nc": (0.46, "some rights reserved (CC BY-NC)"),
    "cc-by": (0.22, "some rights reserved (CC BY)"),
    "cc0": (0.14, "no rights reserved (CC0)"),
    "cc-by-sa": (0.09, "some rights reserved (CC BY-SA)"),
    "cc-by-nc-sa": (0.05, "some rights reserved (CC BY-NC-SA)"),
    "cc-by-nd": (0.02, "some rights reserved (CC BY-ND)"),
    "all-rights-reserved": (0.02, "all rights reserved"),
}
"""How often each licence stands under a picture, and its wording; about as among public plant observations."""

_FORENAMES = "Ada Bruno Clara Dario Elin Farid Greta Hugo Ines Jonas Katya Luis Mira Nils Olga Pavel Rosa Sami".split()
_SURNAMES = "Almeida Berg Costa Dupont Eriksen Fischer Garcia Horvat Ivanov Jansen Keller Lopez Moreau Novak".split()


@dataclass(frozen=True)
class Record:
    """One line of metadata.jsonl. `image_path` is relative to the herbarium's folder."""

    image_path: str
    latin_name: str
    plant_id: str
    common_name: str
    region: str
    country: str
    license: str
    attribution: str
    image_source: str = "herbarium"


def make_record(species: Species, picture_index: int) -> Record:
    """The record of a picture, a function of (species, picture index)."""
    rng = np.random.default_rng(derive(species.seed, "record", species.index, picture_index))
    home = derive(species.seed, "home", species.index) % len(_REGIONS)
    region = _REGIONS[home if rng.random() < _AT_HOME else int(rng.integers(len(_REGIONS)))]
    shares = np.array([share for share, _ in _LICENSES.values()])
    license_name = list(_LICENSES)[int(rng.choice(len(shares), p=shares))]
    collector = f"{_pick(rng, _FORENAMES)} {_pick(rng, _SURNAMES)}"
    return Record(
        image_path=f"{species.folder_name}/{picture_index:04d}.jpg",
        latin_name=species.latin_name,
        plant_id=f"HB{species.index:06d}",
        common_name=species.common_name,
        region=region,
        country=_pick(rng, _COUNTRIES[region]),
        license=license_name,
        attribution=f"(c) {collector}, {_LICENSES[license_name][1]}",
    )


def _pick(rng: np.random.Generator, choices: list[str] | tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]
