"""What the stories are made of: templates of `model.bundled.grammar`, a paragraph a template.

A line broken after `|` or `[` is joined without a space.
"""

from model.bundled.grammar import read_templates

OPENINGS = read_templates("""
Once upon a time, [there was|there lived] a {trait} {kind} [named|called] {name}. {Name} lived
[in a [small|little] house|with {his} mother|with {his} family|all alone] [near|beside|not far
from|at the edge of] the {place}.

Once upon a time, in a [quiet|faraway|small|green] {place}, there lived {a_kind} [named|called]
{name}. {Name} was very {trait}, and everyone [knew|liked|loved] {him}.

Once there was {a_kind} [named|called] {name} who [loved|liked] {food} [more than anything|very
much|best of all]. {He} was {trait} and {trait2}.

Once upon a time there was a {trait} {kind}. {His} name was {name}, and {he} had {a_thing} that
{he} [loved|liked] very much.

There was once a {trait} {kind} who lived [near|by|beside] the {place}. {His} name was {name}.

Long ago, [near|beside] a [great|deep|dark|wide] {place}, there lived a {trait} {kind} whose
name was {name}.

{Name} was a {trait} {kind} who lived [near|by|beside] the {place}. Every [day|morning|evening],
{he} [went for a walk|sang a song|looked at the sky|played in the grass].

One [sunny|bright|cold|warm|rainy|windy] [day|morning|afternoon], a {trait} {kind} named {name}
[went to|walked to|ran to] the {place}.

In a [little|tall|pretty] house [near|beside] the {place} lived {a_kind} named {name}. {He} was
{trait}, but {he} was also a little {trait2}.

{Name} the {kind} was [always|very] {trait}. {He} lived in the {place}, [where|and] the [sun was
warm|trees were tall|wind was cool|birds sang all day].
""")

ENDINGS = read_templates("""
And they lived happily ever after.

From that day on, {name} and {friend} were the best of friends.

That night, {name} [fell asleep|went to bed] with a smile on {his} face.

{Name} was [very happy|happy and proud], and {he} never forgot that day.

And {name} [smiled|laughed], because {he} knew that {he} was not alone any more.

Then they [all went home|went home together] and had [{food}|warm soup|a big supper] by the fire.

The stars came out over the {place}, and all was [quiet|well|still] again.

And if you go to the {place} today, you may [still see them there|hear them sing].

{Name} hugged {his} mother and told her [all about it|the whole story].

Everyone in the {place} was glad, and they [danced|sang|talked] until the moon came up.
""")

MORALS = read_templates("""
{Name} learned that it is good to [share|help others|tell the truth|be kind|be patient].

So remember: a [kind word|good friend|little help] is worth more than gold.

It is better to [ask for help|try again|wait a little] than to [give up|be angry|cry].

Even the smallest {kind} can do a great thing.

Sometimes the best [gift|treasure] of all is a friend.
""")

LOST = read_templates("""
One [day|morning|evening], {name} could not find {his} {thing}. It was {colour}, and {he} [loved
it very much|had had it for a long time|took it everywhere].

{He} looked [under the bed|behind the door|in the kitchen], and {he} looked [in the garden|under
the table|on the stairs], but it was not there. {Name} [was very sad|began to cry|sat down and
sighed].

Just then, {a_friend} came [by|along the road|to the door]. "[Why are you so sad?|What is the
matter?|Why do you cry?]" asked {friend}. "I have lost my {thing}," said {name}.

"[Do not worry|Do not cry|Do not be sad]," said {friend}. "[I will help you look for it|We will
find it together|Two can look better than one]."

They [looked|searched] [all day|for a long time|everywhere], and at last {friend} saw something
{colour} [under a tree|by the river|in the tall grass|behind a stone]. It was the {thing}!

"Thank you, [thank you|my friend]!" said {name}. {He} [jumped up and down|clapped {his} hands|
was so happy that {he} danced].
""")

SHARE = read_templates("""
One day, {name} had a [basket|bag|plate] full of {food}. It was [all for {him}|a present from
{his} grandmother|from the market], and {he} did not want to share.

On the way home, {he} met {a_friend}. "I am so hungry," said {friend}. "May I have some of your
{food}?"

"No," said {name}. "[It is all mine|I want to eat it all myself|There is not enough for two]."
And {he} [ran|walked] on.

But when {name} sat down to eat, {he} [did not feel happy|felt all alone|thought of {friend}].
The {food} did not taste good at all.

So {he} [went back|ran back as fast as {he} could] and said, "I am sorry. [Please eat with me|
Let us share it|Half of it is for you]."

{Friend} smiled. They sat [under a big tree|in the sun|by the water] and ate together, and [now
it tasted sweet|nothing had ever tasted so good].
""")

AFRAID = read_templates("""
{Name} was afraid of [the dark|the deep water|the big wind|the loud thunder|the high hill]. {He}
[hid under the bed|shook all over|did not dare to move] when {he} thought of it.

One [night|evening|day], {a_friend} was in trouble [near|beside] the {far}. "Help! Help!" cried
{friend}.

{Name} [heard the cry|stood up|looked out of the window]. {His} heart beat fast. "I am afraid,"
{he} said, "but [my friend needs me|I must go|I can not stay here]."

{He} took a [lamp|lantern|rope|long stick] and went out, step by step. [The wind blew|The trees
were black|It was very cold], but {he} did not turn back.

At last {he} found {friend} and [pulled {fhim} out|helped {fhim} up|led {fhim} home]. "You are
very brave," said {friend}.

"I was afraid all the time," said {name}. "[That is what brave means|But I came|But you are my
friend]," [said {friend}|{friend} said with a smile].
""")

HELP = read_templates("""
One [cold|rainy|windy|hot] day, {name} [saw|found|met] {a_friend} [by the road|under a tree|near
the river]. {Friend} had hurt {fhis} [foot|leg|arm] and could not walk.

"[Poor thing|Oh dear|Do not be afraid]," said {name}. "I will [help|take care of] you." {He}
[brought some water|tied it up with a soft cloth|carried {fhim} home].

For {number} days {name} [gave {fhim} {food}|looked after {fhim}|sat beside {fhim} and told
stories], until {friend} was well again.

"Thank you," said {friend}. "[One day I will help you too|I will never forget it]."

[Not long after|A few weeks later|When winter came], {name} [fell into the river|lost {his} way
in the {far}|was caught in a great storm]. {He} called and called, but no one came.

No one but {friend}! "[Take my hand|Follow me|Come with me]," said {friend}, and [led|brought]
{name} safely home.
""")

MAKE = read_templates("""
{Name} wanted to make {a_thing} for {his} [mother|father|grandmother|friend]. [It was almost her
birthday|It was to be a surprise|There was not much time].

First {he} [looked for wood|found some paper|took a big box], and then {he} began to [cut|work|
paint]. But the {thing} [broke in two|fell to the floor|looked all wrong].

{He} tried again, and again it [broke|went wrong|fell apart]. "I can not do it," said {name},
and {he} [threw it down|wanted to give up|sat down in the corner].

{Friend} [looked in at the window|came to visit|sat down next to {him}]. "[Try once more|Try it
slowly|Do a little every day]," said {friend}. "[Good work takes time|I will hold it for you|I
know you can]."

So {name} worked [slowly|with care|all afternoon], and this time the {thing} was [perfect|as
pretty as could be|just right].

[Everyone said|They all said] it was the most beautiful {thing} in the {place}. "I made it with
[my own hands|a little help]," said {name}.
""")

STORM = read_templates("""
One [night|afternoon|evening], a great storm came. The wind [blew|howled] and the rain fell
[hard|on the roof|all night].

{Name} [looked out of the window|heard a knock at the door|could not sleep]. Outside stood
{a_friend}, [wet and cold|shaking in the rain|with no place to go].

"May I come in?" asked {friend}. "[My house was blown away|I have lost my way|The water is in my
house]."

"Come in, come in!" said {name}. {He} [gave {fhim} a warm blanket|made a fire|put {food} on the
table], and they [sat by the fire|told each other stories|listened to the rain].

In the morning the sun [was shining|came out], and there was a [great|beautiful] rainbow over
the {place}.

{Friend} gave {name} {a_thing} [to say thank you|as a present]. "[Your house is small, but your
heart is big|You were kind to me]," said {friend}.
""")

LEARN = read_templates("""
{Name} wanted to learn to [swim|dance|sing|read|fly a kite|play the flute|bake bread|climb].
{He} tried [every day|all morning], but {he} could not do it.

"[It is too hard|I will never learn it|I am too small]," said {name}. {He} [kicked a stone|hung
{his} head|went away into the {far}].

There {he} met {a_friend}. "[When I was small|Once]," said {friend}, "I could not do it either.
I tried {number} times, and then [once more|it was easy]."

So {name} tried again. The first time it was [bad|not good]. The second time it was [better|a
little better]. The third time {he} did it!

"[Look at me|I can do it|Did you see that]!" {he} [called|cried|shouted]. {Friend} [laughed|
clapped|was proud of {him}].

After that {name} [practised every day|taught all the others|was the best in the {place}].
""")

SECRET = read_templates("""
One day, {name} found {a_thing} [under a stone|in an old box|behind the wall|in the sand]. It
was very old and it [shone in the sun|made a strange sound|was warm to touch].

"[What can it be?|Where does it come from?|Whose is it?]" {he} wondered. {He} [took it home|put
it in {his} pocket|showed it to {friend}].

"That is a magic {thing}," said {friend}. "[It can give you one wish|If you hold it, you may
make a wish]."

{Name} thought [for a long time|all night]. {He} could wish for [gold|a castle|a new coat], or
for [all the {food} in the world|a white horse|a great ship].

But then {he} [looked at {friend}|saw a poor old man on the road|thought of {his} family], and
{he} said, "I wish that [no one in the {place} is ever hungry|we are always together|everyone is
well and happy]."

The {thing} [began to shine|turned to dust|flew up into the sky], and the wish came true.
""")

RACE = read_templates("""
One day there was a great race [in|near|around] the {place}. "I am the fastest of all," said
{friend}. "[No one can beat me|You can never win]."

{Name} was not fast, but {he} [said nothing|wanted to try|smiled]. "[I will do my best|We will
see]," {he} said.

One, two, three, go! {Friend} [ran|was off] like the wind and was soon far ahead. {Name} [went
on step by step|ran as well as {he} could].

Halfway, {friend} [stopped to eat some {food}|lay down to sleep|looked back and laughed]. "[I
have plenty of time|{Name} is so slow]," {fhe} said.

But {name} did not stop. [Step by step|Little by little], {he} came to the [end of the road|big
tree|old bridge], and {he} won the race!

"[Well done|That was a good race]," said {friend}. "[I will not laugh at you again|You never
gave up]."
""")

GARDEN = read_templates("""
In the spring, {name} [put|planted] a small seed in the ground. "[Grow, little seed|Please
grow]," {he} said, and {he} gave it water every day.

[Day after day|For many days] nothing happened. {Friend} came to look and [laughed|shook {fhis}
head]. "[Nothing will come of it|It is only a stone]," said {friend}.

But {name} [did not give up|waited and waited|went on with {his} work]. The sun shone and the
rain fell.

One morning there was a tiny green leaf! Then there were two, and then {number}, and [soon|
before summer] it was a [tall tree|big plant|beautiful flower].

[In the autumn|At last] it was full of {food}, [and there was enough for everyone|more than
{name} could carry].

"[I was wrong|I am sorry that I laughed]," said {friend}. "[Never mind|That is all right]," said
{name}. "[Come and eat with me|Sit down and have some]."
""")

SORRY = read_templates("""
{Name} had a friend, {friend}, who had {a_thing}. [One day|One afternoon] they played with it
[by the river|in the garden|in the {place}], and {name} broke it.

{Friend} was not looking. {Name} was afraid, so {he} [hid the {thing} under a bush|ran home|said
nothing at all].

"Where is my {thing}?" asked {friend}. "[I do not know|I have not seen it]," said {name}. But
{he} felt [bad|sick|ashamed] all [day|night].

{His} mother saw that {he} was sad. "[It is never too late to tell the truth|Tell the truth, and
you will feel better]," she said.

So {name} went to {friend} and said, "I broke your {thing}. I am very sorry." {Friend} was
[quiet for a while|sad at first], and then {fhe} [smiled|took {his} hand].

"[Thank you for telling me|We can mend it together]," said {friend}. They [worked all afternoon|
found some glue], and soon the {thing} was as good as new.
""")

TRIP = read_templates("""
One day, {name} said, "I want to see [the sea|the world|the other side of the {far}]." So {he}
[packed some {food}|took {his} {thing}|put on {his} hat] and went out of the door.

{He} walked [over the hills|through the {far}|along the river] until {he} met {a_friend}. "Where
are you going?" asked {friend}. "To see the world," said {name}. "[May I come too?|Take me with
you]," said {friend}.

So they went on together. They saw [a tall tower|a bridge of stone|a field of flowers], and they
saw [a ship with white sails|a hundred birds|snow on the mountains].

At night they slept [under the stars|in a barn|under a big tree], and {friend} told {name} [a
story|about the moon|a funny joke].

After {number} days, {name} began to [miss {his} home|feel tired|think of {his} own bed]. "The
world is [big|beautiful]," {he} said, "but [home is best|I want to go home]."

So they turned around and went [home|all the way back], and [the kettle was on the fire|everyone
was glad to see them|there was a light in the window].
""")

PARTY = read_templates("""
It was {name}'s birthday. {He} got up early and [looked out of the window|ran down the stairs|
waited for {his} friends], but no one came.

{He} went to see {friend}. "I have no time," said {friend}. "[I must go to the market|I am very
busy today]." {Name} went to the next house, but [nobody was at home|the door was shut].

"They have all forgotten me," said {name}, and [a tear ran down {his} cheek|{he} walked home
slowly].

But when {he} opened the door, [the room was full of lights|there was a big cake on the table],
and all {his} friends [cried|shouted], "Happy birthday!"

{Friend} gave {him} {a_thing}. There was [cake and {food}|music and cake] for everyone, and they
[danced|played games] until [it was dark|the sun went down].

"I thought you had forgotten," said {name}. "[Never|How could we]," said {friend}. "[We love you|
You are our friend]."
""")

KING = read_templates("""
In the {far} lived a [great|proud|sad] king who [could not laugh|could not sleep|was never
happy]. "Whoever can [help me|make me laugh|bring me joy]," said the king, "shall have {number}
bags of gold."

[Rich men|Wise men|Many people] came from far away. They brought [gold|silver|fine clothes] and
[music|jewels|big books], but the king only [shook his head|sighed|turned away].

Then {name} came with {his} {colour} {thing}. "What do you bring me?" asked the king. "Only
[this {thing}|a story|a song]," said {name}.

{He} sat down beside the king and [told him about the {place}|sang a little song|showed him how
to play]. The king listened, and [he began to smile|his face grew bright].

"[I have been alone too long|I only wanted a friend|That is the best gift of all]," said the
king. "Here is your gold."

"Keep your gold," said {name}. "[May I come again tomorrow?|Give it to the poor.|I have all I
need.]" And the king laughed [out loud|for the first time in years].
""")

SEEK = read_templates("""
One [day|morning], {name} heard [a strange noise|a small voice|someone singing] in the {far}.
"[Who is there?|What is that?]" {he} asked, but no one answered.

{He} went closer and looked [behind a tree|under a leaf|over the wall]. There sat {a_friend}
[with {a_thing}|all alone|with big round eyes].

"[Please do not hurt me|I did not want to scare you|I have no one to play with]," said {friend}.
"[I only want to play|I am far from home]."

"[Do not be afraid|I will not hurt you]," said {name}. "My name is {name}. [Would you like some
{food}?|Come and play with me.]"

So they played [all afternoon|by the water|in the leaves]. {Name} [showed {friend} the best
places to hide|ran and {friend} ran after {him}|taught {friend} a song].

When it was time to go, {friend} said, "[Will you come again?|Will you be my friend?]" "Yes,"
said {name}, "[every day|I promise|of course]."
""")

PLOTS = [
    LOST,
    SHARE,
    AFRAID,
    HELP,
    MAKE,
    STORM,
    LEARN,
    SECRET,
    RACE,
    GARDEN,
    SORRY,
    TRIP,
    PARTY,
    KING,
    SEEK,
]
