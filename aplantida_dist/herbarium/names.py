"""Names of plants that do not exist: plausible Latin, plain ASCII, each species' own."""

from __future__ import annotations

from aplantida_dist.errors import UserError
from aplantida_dist.seeds import derive

_GENUS_STEMS = tuple(
    "Aconth Albin Amard Bellor Borag Brunfel Calad Camel Carpin Cistell Corydal Daphn Drosan Echin Fagor Ficar "
    "Galant Gerv Hedren Helic Iridan Junip Kalmor Lauren Ligust Linnar Lobel Magnor Malvin Melic Myrten Nepet "
    "Orchan Oxal Panic Petror Pimpin Quercin Rhamin Rosell Salvor Scill Silen Tamar Thymel Tilian Ulmar Verban".split()
)
_GENUS_ENDINGS = (("ia", "a"), ("anthus", "us"), ("ium", "um"), ("ella", "a"), ("aster", "us"))
"""How a genus ends, and how its epithets then end: an adjective agrees in gender."""

_EPITHETS = tuple(
    pair.split(":")
    for pair in (
        "acut:pointed alb:white alt:tall ambigu:doubtful angust:narrow aquatic:water arct:northern argute:sharp "
        "aure:golden austri:southern barbat:bearded bulbos:bulbous caerule:blue campestr:field can:hoary caud:tailed "
        "ciliat:fringed cinere:ashen clar:bright cordat:heart-shaped crisp:curly cruent:blood curvat:bent dens:dense "
        "dentat:toothed dubi:uncertain elat:lofty falcat:sickle ferr:rusty firm:stiff flav:yellow foetid:stinking "
        "fusc:dusky glabr:smooth glauc:grey-blue hirsut:hairy lact:milky lat:broad lax:loose long:long lucid:shining "
        "lute:saffron maculat:spotted magn:great maritim:sea montan:mountain nigr:black nitid:gleaming nud:naked "
        "obscur:dark pallid:pale palustr:marsh parv:little pictat:painted plan:flat prat:meadow pumil:dwarf "
        "purpure:purple rar:rare repand:wavy rigid:rigid ros:rosy rotund:round rubr:red rugos:wrinkled sax:rock "
        "scabr:rough sericat:silky serrat:saw-edged silvatic:forest sinuat:winding splendid:splendid spinos:thorny "
        "striat:striped tard:late tenu:slender torv:grim trist:sad undulat:rippled variegat:motley ver:true vill:shaggy"
    ).split()
)

_NUM_GENERA = len(_GENUS_STEMS) * len(_GENUS_ENDINGS)
MAX_SPECIES = _NUM_GENERA * len(_EPITHETS)
_STRIDE = 7_919
"""A prime that divides no count above, so that stepping by it meets every name once."""


def latin_name(seed: int, index: int) -> str:
    """The genus and epithet of a species, such as "Salvoria rubra"; no two indices below MAX_SPECIES share one."""
    genus, epithet = _genus_and_epithet(seed, index)
    stem = _GENUS_STEMS[genus // len(_GENUS_ENDINGS)]
    ending, agreement = _GENUS_ENDINGS[genus % len(_GENUS_ENDINGS)]
    return f"{stem}{ending} {_EPITHETS[epithet][0]}{agreement}"


def common_name(seed: int, index: int, *, noun: str) -> str:
    """The English name: what the epithet means, before the noun of the leaf's form; several species may share one."""
    return f"{_EPITHETS[_genus_and_epithet(seed, index)[1]][1]} {noun}"


def _genus_and_epithet(seed: int, index: int) -> tuple[int, int]:
    if not 0 <= index < MAX_SPECIES:
        raise UserError(
            f"herbarium: species {index} has no name; there are names for {MAX_SPECIES}: draw fewer species"
        )
    code = (derive(seed, "names") + index * _STRIDE) % MAX_SPECIES
    return divmod(code, len(_EPITHETS))
