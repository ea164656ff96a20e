"""Small facts for the dialogues: a question is only asked where its answer is one of these."""

from model.bundled.grammar import items, table

CAPITALS = table("""
France: Paris; Germany: Berlin; Italy: Rome; Spain: Madrid; Portugal: Lisbon; England: London;
Ireland: Dublin; Scotland: Edinburgh; Norway: Oslo; Sweden: Stockholm; Denmark: Copenhagen;
Finland: Helsinki; Poland: Warsaw; Austria: Vienna; Switzerland: Bern; Belgium: Brussels; Greece:
Athens; Turkey: Ankara; Hungary: Budapest; Russia: Moscow; Ukraine: Kyiv; Egypt: Cairo; Kenya:
Nairobi; Morocco: Rabat; Japan: Tokyo; China: Beijing; India: Delhi; Thailand: Bangkok; Canada:
Ottawa; Cuba: Havana; Peru: Lima; Chile: Santiago; Iceland: Reykjavik; Australia: Canberra;
Croatia: Zagreb; Iran: Tehran; Iraq: Baghdad; Vietnam: Hanoi; Mongolia: Ulaanbaatar
""")

COLOURS_OF = table("""
the sky: blue; grass: green; snow: white; the sun: yellow; a banana: yellow; a tomato: red; coal:
black; milk: white; a carrot: orange; a leaf: green; blood: red; chocolate: brown; a lemon:
yellow; a frog: green; the sea: blue; an orange: orange; a crow: black; a strawberry: red; a plum:
purple; a pig: pink; gold: yellow; an elephant: grey
""")

OPPOSITES = table("""
big: small; hot: cold; day: night; up: down; happy: sad; fast: slow; old: young; good: bad; light:
dark; open: closed; hard: soft; high: low; rich: poor; wet: dry; early: late; long: short; full:
empty; left: right; yes: no; strong: weak; black: white; loud: quiet; near: far; clean: dirty;
first: last; summer: winter; love: hate; true: false; win: lose
""")

SOUNDS = table("""
dog: woof; cat: meow; cow: moo; duck: quack; sheep: baa; pig: oink; horse: neigh; frog: croak;
bee: buzz; owl: hoot; mouse: squeak; lion: roar; crow: caw; hen: cluck; snake: hiss; llama: hum
""")

YOUNG = table("""
dog: puppy; cat: kitten; cow: calf; sheep: lamb; horse: foal; duck: duckling; goat: kid; bear:
cub; hen: chick; pig: piglet; llama: cria; swan: cygnet; frog: tadpole; deer: fawn; goose:
gosling; lion: cub; owl: owlet
""")

LEGS = table("""
dog: four; cat: four; horse: four; cow: four; llama: four; bird: two; duck: two; hen: two; person:
two; spider: eight; bee: six; ant: six; snake: no; fish: no; snail: no; frog: four; beetle: six
""")

HOMES = table("""
bird: a nest; bee: a hive; fox: a den; rabbit: a burrow; fish: the water; horse: a stable; pig: a
sty; dog: a kennel; spider: a web; whale: the sea; bear: a cave; llama: the mountains of Peru;
king: a castle; frog: a pond; squirrel: a tree; camel: the desert; penguin: the cold south;
monkey: the forest
""")

DAYS = items("""
Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday
""")

MONTHS = items("""
January, February, March, April, May, June, July, August, September, October, November, December
""")

NUMBERS = items("""
zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen,
fourteen, fifteen, sixteen, seventeen, eighteen, nineteen, twenty
""")

MEANINGS = table("""
a llama: a llama is a tall animal with soft wool that lives in the mountains of Peru and carries
  loads;
a cat: a cat is a small animal with soft fur that likes milk, sleeps in the sun and catches mice;
a dog: a dog is a friendly animal that lives with people, guards the house and likes to run;
a bird: a bird is an animal with feathers and wings, and most birds can fly;
a book: a book is a set of pages with words or pictures that you can read;
a clock: a clock is a thing that shows the time;
a king: a king is a man who rules a country;
a queen: a queen is a woman who rules a country;
a river: a river is a long stream of water that runs down to the sea;
a mountain: a mountain is a very high hill, often with snow on its top;
the moon: the moon is a great ball of rock that goes around the earth and shines at night;
the sun: the sun is a star, and it gives us light and warmth;
rain: rain is water that falls in drops from the clouds;
snow: snow is water that has frozen into small white flakes;
a rainbow: a rainbow is an arch of colours in the sky that comes when the sun shines through the
  rain;
the sea: the sea is the great salt water that covers most of the earth;
a friend: a friend is someone who likes you, helps you and is glad to see you;
a tree: a tree is a tall plant with a trunk, branches and leaves;
bread: bread is a food made from flour and water and baked in an oven;
a baker: a baker is a person who makes bread and cakes;
a doctor: a doctor is a person who helps sick people to get well;
a farmer: a farmer is a person who grows food and keeps animals;
a teacher: a teacher is a person who helps others to learn;
a language model: a language model is a computer program that reads some text and guesses the next
  word;
a computer: a computer is a machine that follows instructions and works with numbers and words;
a llama model: a Llama model is a kind of language model, and I am a very small one;
pronk: pronk is a program that serves Llama models over HTTP, and to pronk is to leap with all
  four feet;
honey: honey is a sweet food that bees make from flowers;
winter: winter is the cold season, when the days are short and snow may fall;
spring: spring is the season when the days grow warm and the flowers come;
summer: summer is the warm season, when the days are long;
autumn: autumn is the season when the leaves turn red and fall;
a poem: a poem is a short piece of writing, often with lines that rhyme;
a star: a star is a great ball of fire, so far away that it looks like a small light;
""")

LISTS = {
    "animals": items("dog, cat, horse, llama, cow, sheep, lion, bear, fox, mouse, rabbit, owl"),
    "fruits": items("apple, pear, plum, banana, cherry, orange, grape, lemon, peach, strawberry"),
    "colours": items("red, blue, green, yellow, black, white, orange, purple, brown, pink"),
    "vegetables": items("carrot, potato, onion, cabbage, pea, bean, leek, turnip"),
    "birds": items("owl, crow, sparrow, robin, swan, duck, goose, hen, eagle"),
    "days of the week": DAYS,
    "months": MONTHS,
    "things in a house": items("table, chair, bed, lamp, door, window, clock, shelf, carpet"),
    "countries": items("France, Italy, Spain, Japan, Peru, Egypt, India, Canada, Norway, Kenya"),
    "cities": items("Paris, London, Rome, Tokyo, Cairo, Oslo, Vienna, Lima, Berlin, Madrid"),
    "flowers": items("rose, daisy, tulip, lily, violet, poppy, sunflower"),
    "names for a llama": items("Lola, Pedro, Fluffy, Paco, Bella, Coco, Woolly, Luna, Daisy"),
    "foods": items("bread, cheese, soup, rice, cake, honey, porridge, pie, eggs"),
}
JOKES = [
    ("Why did the llama cross the road?", "Because the chicken was on holiday."),
    ("What do you call a sleeping bull?", "A bulldozer."),
    ("Why did the clock go to school?", "Because it wanted to learn the time."),
    ("What has four legs and can not walk?", "A table."),
    ("What has hands but can not clap?", "A clock."),
    ("Why are fish so clever?", "Because they are always in schools."),
    ("What gets wetter the more it dries?", "A towel."),
    ("Why did the book go to the doctor?", "Because it had too many words in its head."),
]
POEM_LINES = [
    ("The {trait} {kind} sat in the sun,", "and laughed because the day was fun."),
    ("The moon came up above the hill,", "and all the little birds were still."),
    ("I saw a {kind} beside the sea,", "it looked around and smiled at me."),
    ("The wind is soft, the sky is blue,", "and I will sing a song for you."),
    ("The stars are bright, the night is deep,", "and in the house we fall asleep."),
    ("The {kind} went walking in the rain,", "and then it walked back home again."),
    ("A {trait} {kind} came to my door,", "and ate my {food} and asked for more."),
    ("The snow falls down on field and tree,", "as white and quiet as can be."),
    ("The river runs, the river sings,", "it tells the birds of distant things."),
    ("Oh, {kind}, oh, {kind}, where have you been?", "In all the fields so fresh and green."),
    ("The day is done, the sun is low,", "it is the time for us to go."),
    ("A little {kind} with a hat of red,", "ran up the stairs and went to bed."),
]
