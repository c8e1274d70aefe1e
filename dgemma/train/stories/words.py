"""Word lists of the story grammar: names, kinds, colours, places, families, and when things happen.

Only data. `stories.py` draws from these lists and its checker reads them back. Every kind, colour and thing
starts with a consonant sound, so that "a" is always the right article."""

BOYS = ("Ben", "Tom", "Max", "Leo", "Sam", "Jack", "Noah", "Finn", "Oscar", "Theo")
GIRLS = ("Mia", "Lily", "Anna", "Emma", "Rose", "Sara", "Ella", "Nora", "Ruby", "Clara")
HE_ANIMALS = ("Pip", "Bruno", "Rusty", "Toby", "Barney", "Milo", "Otto", "Hugo", "Felix", "Archie")
SHE_ANIMALS = ("Daisy", "Hazel", "Molly", "Poppy", "Luna", "Willow", "Tilly", "Pearl", "Honey", "Bella")

ANIMALS = (
    "rabbit",
    "fox",
    "bear",
    "mouse",
    "squirrel",
    "duck",
    "hedgehog",
    "kitten",
    "puppy",
    "badger",
    "beaver",
    "frog",
)
COLOURS = ("red", "blue", "green", "yellow", "purple", "pink", "white", "brown", "golden", "silver")
FAMILY = {"mother": "f", "father": "m", "grandmother": "f", "grandfather": "m", "aunt": "f", "uncle": "m"}

# place -> the same place with the preposition that suits it
PLACES = {
    "the park": "in the park",
    "the forest": "in the forest",
    "the meadow": "in the meadow",
    "the valley": "in the valley",
    "the village": "in the village",
    "the river": "by the river",
    "the lake": "by the lake",
    "the pond": "by the pond",
    "the sea": "by the sea",
    "the beach": "on the beach",
    "the hill": "on the hill",
    "the farm": "at the farm",
    "the market": "at the market",
    "the old mill": "at the old mill",
}

LONG_AGO = ("Once upon a time",) * 8 + ("Long ago", "Many years ago", "Not so long ago")
ONE_DAY = ("One day", "One sunny morning", "One bright morning", "One warm afternoon", "One quiet day")
WHEN_LONG = ("One day", "One morning", "One afternoon", "One Saturday", "Early one morning", "Then one day")
WHEN_DAY = ("That day", "A little later", "Soon after that", "After lunch")

PRONOUNS = {
    "he": ("he", "she"),
    "him": ("him", "her"),
    "his": ("his", "her"),
    "himself": ("himself", "herself"),
    "He": ("He", "She"),
    "His": ("His", "Her"),
}
NOT_NAMES = (
    "He",
    "She",
    "His",
    "Her",
    "They",
    "It",
    "The",
    "Then",
    "There",
    "That",
    "This",
    "We",
    "You",
    "Their",
    "Everyone",
    "One",
    "Once",
    "Soon",
    "At",
    "In",
    "And",
    "But",
    "So",
    "When",
    "After",
    "First",
    "All",
    "Both",
    "As",
    "From",
    "What",
)
