"""The words of needle keys and of the common-words task.

The official scripts take them from the package wonderwords and, for longer lists, from a dictionary of English. So do
these, where wonderwords is installed (the `benchmarks` extra); otherwise they are lists of our own. In place of the
package there may be files: a folder with its `nounlist.txt`, `adjectivelist.txt` and `verblist.txt`, and, for longer
lists, RULER's `english_words.json`.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path


def _listed(text: str) -> list[str]:
    return text.split()


ADJECTIVES = _listed("""
able abrupt absent acidic active agile alert alpine amber ample ancient angular annual arctic ardent arid artful
ashen astute atomic autumnal awake awkward balanced bare bashful basic beige bitter blank bleak blissful blue blunt
boastful bold bony brave brief bright brisk broad bronze brown bulky bumpy busy calm candid careful careless casual
cautious central charming cheap cheerful chilly chubby circular civic civil clean clear clever cloudy clumsy coarse
coastal cold colorful common compact complete complex concrete content cool copper cordial costly cosy courteous
crafty creamy crimson crisp crooked cruel cubic curious curly cute daily damp daring dark dear decent deep dense
devoted diligent dim direct distant divine dizzy domestic double dramatic dreamy dry dual dull durable dusty dutiful
eager early earnest easy edible elastic elated elderly electric elegant eloquent empty endless enormous even exact
exotic expert faint fair faithful false famous fancy fast fearless feeble fertile festive fierce final firm fiscal
flat flexible floral fluent fluffy foggy fond foreign formal fragile fragrant frank free frequent fresh friendly
frosty frozen frugal full funny fuzzy gallant gaseous generous gentle genuine giant giddy glad glassy gleaming
global gloomy glossy golden graceful grand grassy grateful gray greasy great green gritty gross grumpy handy happy
hardy harsh hasty hazy healthy hearty heavy helpful hidden high hollow holy honest hopeful hostile huge humble humid
hungry icy idle immense inland inner intense ivory jagged jolly jovial joyful juicy keen kind known large late
lavish lawful lazy lean legal level light likely limber liquid literal little lively lofty lonely long loose loud
lovely loyal lucid lucky lunar lush magic major manual marble marine massive mature meager mellow merry mighty mild
minor misty mobile modern modest moist moody moral muddy mute mutual narrow native neat nervous neutral new nimble
noble noisy normal northern novel numb oblong odd oily old olive opaque open optimal orange ornate oval overt pale
partial patient peaceful pearly perfect petite placid plain playful plump plural polar polite popular portable
precise pretty primal prompt proper proud public pure purple quaint quick quiet radiant rapid rare raw ready real
recent regal remote rich rigid ripe robust rosy rough round royal rugged rural rustic sandy savory scarce scenic
secret secure serene severe shady shallow sharp shiny short shy silent silky silver simple sincere skillful sleek
sleepy slender slim slow sly small smart smoky smooth snug soft solar solemn solid sonic sour southern spare sparse
speedy spicy stable stark steady steep sterile stern sticky stiff still stormy stout strange strict strong sturdy
subtle sudden sugary sunny superb sweet swift tall tame tangy tart tender tepid thick thin thirsty thorough tidy
tight timid tiny tough tranquil tropical true trusty twin unique upper urban useful usual vague valid vast verbal
vibrant violet vital vivid vocal warm wary watchful wavy weary wet white wicked wide wild windy wise witty wooden
woolen worthy yellow young zealous zesty
""")

NOUNS = _listed("""
acorn actor airport album alley almond alphabet amplifier anchor angle animal ankle antler apple apron arch archer
arena armchair arrow artist aspen athlete atlas attic author avenue baboon badger bagel baker balcony balloon bamboo
banana bandage banjo banker barley barn barrel basil basket bassoon bathtub battery beach beacon beaver bedroom
beetle bell bench berry bicycle biscuit blanket blossom boat bonfire bonnet book border bottle boulder bowl bracelet
branch bread breeze brick bridge broom brush bucket buffalo bugle builder bulb burrow bus butcher button cabbage
cabin cactus cafe calendar camel camera canal candle canoe canvas canyon captain caravan cargo carpet carrot cart
castle cathedral cavern cedar cellar cello chalk channel chapel chapter cheese cherry chestnut chimney chisel church
cider cinema circus citizen clarinet cliff clinic clock closet cloud clover coach coast cobbler coconut coffee
collar comet compass copier coral cork corner cottage cotton couch courtyard cousin crane crater crayon creek
cricket crown crystal cupboard curtain cushion cymbal daisy dancer deer dentist desert desk diamond diary dinner
doctor dolphin donkey door dragon drawer dress driver drum duck eagle easel echo eel elbow elephant elevator engine
envelope eraser estate evening fabric factory falcon farmer feather fence fern ferry fiddle field finger fireplace
fisher flag flame flask flower flute folder forest fork fossil fountain fox freezer friend frog furnace galaxy
gallery garage garden garlic gate gazelle geyser ginger giraffe glacier glove goat goose gorilla granite grape
guitar hallway hammer hammock harbor harp hat hawk heart hedge helmet heron highway hill hippo honey horizon horse
hospital hotel house hunter hurdle iceberg igloo insect iris iron island jacket jaguar jar jasmine jelly jersey
jewel jigsaw journal judge jug juice jungle juniper kayak kennel kettle key kitchen kite kitten knife knight knot
ladder lagoon lake lamp lantern laptop laundry lawn lawyer leaf lemon lens leopard letter library lighthouse lily
lime lion lizard lobster locket log lunch lynx machine magazine magnet mailbox mango mansion map maple market mask
mattress meadow medal melon memo metal meteor microscope mill mirror mitten molecule monkey monsoon moon moose
mosaic moss motor mountain mouse muffin museum musician napkin necklace needle nest newspaper notebook novelist
nurse nutmeg oak oasis oboe ocean octopus office omelet onion opera orbit orchard orchid organ ostrich otter outpost
oven owl oyster paddle page palace panda pantry paper parade parcel park parrot passport pasture patio paw peach
peanut pear pebble pelican pencil penguin pepper perfume petal phone photo piano pickle picnic pigeon pillow pilot
pine pirate planet plate plaza plum pocket poem poet pond poppy porch portrait postcard potato pottery prairie
prince printer prism prize propeller puddle pumpkin puppet puzzle pyramid quail quarry quartz queen quilt quiver
rabbit raccoon radio raft railway rainbow ranch raven recipe reef referee ribbon ridge ring river road robin rocket
roof rooster rope rose rudder ruler saddle sailor salad salmon salt sandal sandwich satellite sauce saucer saxophone
scarf scholar school scooter sculptor seal seashore seed shadow shark shed shelf shell shepherd ship shirt shoe
shovel sink sister skate sketch sled slipper snail snow sofa soldier soup spade sparrow spider spinach spoon
squirrel stable stadium staircase stamp star station statue stone stool store stove straw stream street student
subway suitcase summit sunset surgeon swan sweater swing sword syrup table tailor tambourine tea teacher teapot
telescope temple tent terrace theater thimble thistle thread throne thunder ticket tiger tile timber toast tomato
topaz torch tortoise towel tower tractor trail train treasure tree trolley trombone trout truck trumpet tugboat
tulip tunnel turkey turnip turtle tutor umbrella uncle uniform vacuum valley van vase vault veil velvet verandah
village vine vineyard viola violin visitor volcano voyage waffle wagon waiter wallet walnut walrus wardrobe
waterfall weasel whale wheat wheel whisker whistle widow willow window winter wizard wolf wombat wool wrench writer
yacht yard yarn zebra zipper zoo
""")

VERBS = _listed("""
accept achieve admire adopt advise agree allow announce answer appear applaud approve argue arrange arrive assemble
assist attach attempt attend avoid bake bathe become begin believe belong bend blend blink borrow bounce breathe
bring build calculate carry carve celebrate change chase cheer choose clap clarify climb collect combine compare
compete complain compose confess connect consider consult contain continue convince cook correct count cover crawl
create cultivate dance decide declare decorate defend delay deliver demand deny depart describe design destroy
develop discover discuss divide donate dream drift earn educate embark emerge employ enable encourage endure enjoy
enter erase escape establish estimate evaluate examine exceed exchange exclaim exist expand expect explain explore
express fasten fetch finish float follow forget forgive gather gaze give glance govern grab greet grind grow grumble
guess guide handle happen hasten hesitate hover identify ignore imagine imitate improve include increase inform
inhale inherit inspect inspire install instruct intend introduce invent invite jog join juggle justify knit knock
laugh launch learn lift linger listen maintain manage measure mend mention migrate mingle motivate multiply narrate
navigate negotiate notice obey observe obtain occupy offer operate organize overcome participate perform permit
persuade plan ponder practice praise predict prepare preserve prevent proceed produce promise pronounce protect
provide publish pursue question reach realize recall receive recognize recommend recover reduce reflect refuse
regret rehearse relate relax remain remember remind remove repair repeat replace reply request rescue resemble
resolve respond restore retire return reveal revise roam satisfy scatter search select separate shiver simplify
solve speak specify sprint stumble succeed suggest supply support surprise surround survive swim teach tell think
thrive tolerate transform translate travel tremble understand unfold unite unlock vanish verify wander warn weave
welcome whisper wonder write yawn yell
""")

MOST_COMPOUNDED = 625
"""Nouns that compounds are made of, at least this many of a longer list: one in so many, from the first on."""
_FILES = {"nouns": "nounlist.txt", "adjectives": "adjectivelist.txt", "verbs": "verblist.txt"}
_DICTIONARY = "english_words.json"


@dataclass(frozen=True)
class WordList:
    """Words, and where they come from.

    plain: nouns, adjectives and verbs, each once, sorted. many: for lists longer than `plain`; never mixed with it.
    """

    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    plain: tuple[str, ...]
    many: tuple[str, ...]
    source: str
    source_of_many: str

    def key(self, rng: random.Random) -> str:
        """An adjective and a noun with a hyphen, all pairs with equal chance."""
        return f"{rng.choice(self.adjectives)}-{rng.choice(self.nouns)}"

    @property
    def most(self) -> int:
        """The longest list of different words that there is."""
        return max(len(self.plain), len(self.many))

    def sample(self, count: int, rng: random.Random) -> list[str]:
        """`count` different words: plain ones if there are enough of them, otherwise of `many`."""
        return rng.sample(self.plain if count <= len(self.plain) else self.many, count)

    def source_for(self, count: int) -> str:
        """Where the words of `sample(count, ...)` come from."""
        return self.source if count <= len(self.plain) else self.source_of_many


@cache
def word_list(folder: Path | None = None) -> WordList:
    """The words of wonderwords, or of a folder with its files; ValueError for a folder without them.

    Without either the built-in ones: `source` says which they are.
    """
    if folder is None and find_spec("wonderwords") is None:
        return _make(NOUNS, ADJECTIVES, VERBS, dictionary=None, source="built-in words")
    if folder is None:
        assets = files("wonderwords") / "assets"
        parts = {part: _unique((assets / name).read_text("utf-8").split("\n")) for part, name in _FILES.items()}
        return _make(**parts, dictionary=None, source=f"words of wonderwords {version('wonderwords')}")
    parts = {part: _read(folder / name) for part, name in _FILES.items()}
    dictionary = folder / _DICTIONARY
    many = list(json.loads(dictionary.read_text("utf-8")).values()) if dictionary.exists() else None
    return _make(**parts, dictionary=many, source=f"words of {folder.name}")


def _make(
    nouns: list[str], adjectives: list[str], verbs: list[str], *, dictionary: list[str] | None, source: str
) -> WordList:
    nouns, adjectives = _unique(nouns), _unique(adjectives)
    return WordList(
        nouns=tuple(nouns),
        adjectives=tuple(adjectives),
        plain=tuple(sorted({*nouns, *adjectives, *verbs})),
        many=tuple(_unique(dictionary) if dictionary else _compounds(nouns)),
        source=source,
        source_of_many=f"{_DICTIONARY}" if dictionary else f"compounds of the nouns of the {source}",
    )


def _compounds(nouns: list[str]) -> list[str]:
    some = nouns[:: max(1, len(nouns) // MOST_COMPOUNDED)]
    return _unique([first + second for first in some for second in some if first != second])


def _read(path: Path) -> list[str]:
    try:
        words = _unique(path.read_text("utf-8").split("\n"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: a folder of words needs {', '.join(_FILES.values())}") from error
    if not words:
        raise ValueError(f"{path} holds no words")
    return words


def _unique(words: list[str]) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in words if word.strip()))
