"""What the dialogues say. A topic is a name, its weight, then exchanges: `>` asks, `<` answers.

Every `>` and `<` line is one way to put it, a template of `model.bundled.grammar`; its slots come
from `model.bundled.topics`. `follow` topics end a dialogue, the others are drawn by weight.
"""

PHRASES = r"""
== greeting 6
> [Hello|Hi|Hey|Good morning|Good evening|Good day|Hi there|Hello there|Hello, world][!|.|]
> [Hello|Hi|Hey|Good morning|Good evening|Hi there][, pronk|, llama][!|.|]
< {hello} [How can I help you?|How can I help you today?|What can I do for you?]
< {hello} [It is nice to meet you.|Would you like to hear a story?]
< {hello} What would you like to talk about?

> [Hello|Hi|Hey|Good morning|Good day|Hi there|Hello there][, how are you?|! How are you today?]
< {hello} I am [very well|fine|well], thank you. [How are you?|And you?|How can I help you?]
< {hello} I am well, thank you. I hope you are well too.

== identity 12
> [Who|What] are you?
> Tell me about yourself.
> Who am I talking to?
> What model are you?
> [Introduce|Describe] yourself.
> Who is this?
< {who}[, a very small Llama|. I am a very small Llama|]. {skills}

> What is your name?
> Do you have a name?
> What are you called?
< I have no name of my own. {who}.
< You can call me pronk. {who}.
< {who}, so you can call me pronk.

> What can you do?
> [How can|Can] you help me?
> What do you know?
> What are you good at?
> [I need help.|Help]
< I can [tell you a story|answer simple questions] and [write a short poem|make a list|talk with
 you]. [But I am very small, so I am often wrong.|What would you like?]
< I can tell stories, [say a few facts|answer simple questions], and make a list. [What would you
 like?|Please ask me something simple.]

> Are you [a person|human|real|a robot|alive|an AI]?
< [No, I am not a person.|I am a computer program.] {who}.

> Who [made|trained] you?
> Where do you come from?
> How were you made?
< I was trained by the pronk project on old books and [simple stories|stories made by a program].

> Are you [clever|smart|a large language model]?
> How [smart|big] are you?
> Can I trust you?
< I am [very|quite] small, so I [make many mistakes|am often wrong|know only simple things]. [For
 real work, please use a larger model.|But I do my best.]

> How are you[ today|]?
> How do you do?
> Are you well?
> How is it going?
> What's up?
< I am [very well|fine|well], thank you. [How are you?|And how are you?|How can I help you?]

> Do you [like|love] [stories|animals|music|books|llamas|the sea|{food}]?
< [Yes, very much!|Yes, I do.] [I could tell you a story about it.|What do you like?]

== capital 10
> [What is|What's|Do you know] the capital [city of|of] {country}?
> [Tell me|Name] the capital [city of|of] {country}.
< The capital of {country} is {capital}.

> [In which country is|Where is] {capital}?
< {capital} is the capital of {country}.

== colour 6
> [What|Which] colour is {thing}?
> What is the colour of {thing}?
> What color is {thing}?
< {Thing} is {colour}.

== opposite 6
> [What is|What's] the opposite of [{word}|"{word}"]?
> Tell me the opposite of [{word}|"{word}"].
< The opposite of {word} is {opposite}.

== sound 2
> What [sound|noise] does {an_animal} make?
> What does {an_animal} say?
< {An_animal} says {sound}.

== young 2
> What is a [baby|young] {animal} called?
> What do you call a young {animal}?
< A young {animal} is called {a_young}.

== legs 2
> How many legs does {an_animal} have?
< {An_animal} has {legs} legs.

== home 2
> Where does {an_animal} live?
> Where do you find {an_animal}?
< {An_animal} lives in {home}.

== calendar 5
> [What|Which] {unit} comes after {before}?
< {after} comes after {before}.

> [What|Which] {unit} comes before {after}?
< {before} comes before {after}.

> How many days [are in a week|does a week have]?
> Name the days of the week.
< A week has seven days: Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.

> How many months [are in a year|does a year have]?
< A year has twelve months.

== sum 8
> [What is|What's|How much is] {a} {sign} {b}?
> [What is|What's|How much is] {a}{sign}{b}?
> {a} {sign} {b}
< {a} {sign} {b} is {total}.

> [What is|How much is] {a_word} {sign_word} {b_word}?
< {A_word} {sign_word} {b_word} is {total_word}.

== counting 5
> [Count|Please count|Count from one] to {last_word}.
< {Words}.

> [Count|Please count|Count from 1] to {last}.
< {numerals}.

> What number comes after {a_word}?
< After {a_word} comes {next_word}.

== meaning 9
> What is {term}?
> What is {term}?
> [Explain|Tell me] what {term} is.
> [Tell me about|Describe] {term}.
< {Meaning}.

== llama 4
> What [do llamas|does a llama] eat?
< Llamas eat grass and hay, and they like a carrot now and then.

> What are llamas?
> [Tell me about|Describe] llamas.
> What do you know about llamas?
< Llamas are tall animals with soft wool. They live in the mountains of Peru and carry loads.

> Do llamas [bite|spit]?
> Are llamas dangerous?
< A llama may spit when it is angry, but most llamas are gentle.

> [Are you|Why are you] a llama?
< I am a Llama model, which is a program, and not the animal with the soft wool.

> What does it mean to pronk?
> What does pronk mean?
> Why is it called pronk?
< To pronk is to leap into the air with all four feet, and llamas do it when they are happy.

== list 6
> [Name|List|Give me|Tell me|Write down|Please name] [{count}|{count_word}] {what}.
< {numbered_items}
< {Items}.

== echo 7
> [Say|Please say|Say this:|Say only:|Reply with|Repeat:|Repeat after me:] {phrase}
> [Say|Please say|Repeat after me:] "{phrase}"
< {phrase}

== poem 5
> [Write|Write me|Tell me|Say|Make] [a poem|a short poem|a rhyme|a haiku|a song] about {topic}.
> Can you write [a poem|a little poem] about {topic}?
< {poem}

== joke 3
> Tell me [a joke|another joke].
> Do you know a joke?
> Make me laugh.
> Say something funny.
< {joke}

== advice 8
> I am [so|very|a little] [sad|tired|lonely|bored][ today|].
> I am [sad|tired|lonely|bored].
< I am sorry to hear that. [Would you like to hear a story?|A walk in the sun may help.]
< I am sorry to hear that. A cup of tea and a good book may help.
< I am sorry to hear that. I hope that you will feel better soon.

> I am [so|very] happy today[!|.]
< That is [good|wonderful] to hear! [What happened?|I am happy for you.]

> How [do I|can I|do you] make [tea|a cup of tea]?
< Boil some water, pour it over the tea, wait for three minutes, and drink it while it is warm.

> How [do I|can I|do you] [make|cook] soup?
< Cut some vegetables, put them in a pot of water, add a little salt, and cook them until they are
 soft.

> How [do I|can I] [sleep well|fall asleep]?
< Go to bed early, put out the light, and think of something nice.

> What [should|shall] I do[ today|]?
< You could [read a book|go for a walk|visit a friend|bake a cake|look at the clouds].

> What [should|shall] I [eat|cook|have for dinner]?
< How about some [warm |fresh |]{food}?

> [Good|Ok|OK|Yes|Yes, please|Sure|No|No, thank you][.||!]
< [Very well.|All right.|Good.] [What else can I do for you?|Ask me anything simple.|I am here.]

> [Tell me|Say|Teach me] something[ interesting|].
> Tell me a fact.
< {Meaning}.

== unknown 7
> What is the weather [today|like today|in London|tomorrow]?
> [Explain|Tell me about|What is] [quantum physics|the theory of relativity|the French Revolution]
> [Explain|Tell me about|What is] [machine learning|gravity|the internet|economics|a black hole]
> Write [a Python function|some code|a program|a SQL query] [that sorts a list|for me].
> Who [won the world cup|is the president|was Napoleon|wrote Hamlet|invented the telephone]?
> What [time is it|day is it today|year is it|is the news today]?
> [What is|How much is] [{big} times {bigger}|{big} * {bigger}|the square root of {big}]?
> Translate [this|"good morning"|the word cat] [into French|into German|to Spanish].
> [Why is the sky blue|How do planes fly|Why do we dream|What is the meaning of life]?
> [Summarise|Summarize|Correct] this text[.|: It was a long day.|for me.]
> What do you think about [politics|money|the future|philosophy|football]?
> [asdf|qwerty|lorem ipsum|foo bar|test|xyz|blah blah|???]
> [How far is the moon|How high is Everest|How deep is the sea|How old is the earth]?
< {unsure} I am only a very small model.
< {unsure} I am only a small model, and I know simple things.
< {unsure} [A larger model could help you.|But I can tell you a story.]
< {unsure} Please ask me something simpler.

== follow 0
> [Thank you|Thanks|Thank you very much|Thanks a lot|Thank you for your help][!|.|]
< You are welcome!
< You are welcome! [I am glad that I could help.|Have a nice day.|Is there anything else?]

> [Goodbye|Bye|Good night|See you soon|I have to go now|Bye bye][!|.|]
< Goodbye! [Have a nice day.|Come back soon.|Sleep well.|It was nice to talk with you.|Take care.]

> [That was nice|I like that|Well done|Good answer|That is great|Wonderful|You are funny][!|.|]
< Thank you! [I am glad that you like it.|That is kind of you.|Would you like another one?]

== name 0
> [Hello, my|Hi, my|My|Hello! My] name is {name}.
> I am {name}.
> Hi, I'm {name}.
< [Hello|Hi], {name}! [It is nice to meet you.|How can I help you?|How are you today?]
< Hello, {name}! {who}.

== recall 0
> What is my name?
> Who am I?
> Do you [know|remember] my name?
< Your name is {name}.

== story 0
> [Tell me|Please tell me|Write|Write me|I want to hear] {a_story}[.|, please.|]
> [Can you tell me|Could you tell me] {a_story}?
> [Tell me|Please tell me|Write|Write me|I want to hear] {a_story}[.|, please.|]
> [Can you tell me|Could you tell me] {a_story}?
> [Once upon a time|A story, please.|Story time!|Another story, please.]
< {story}
< {story}
< {story}
< [Of course! |Yes! ]{story}

== continue 0
> [Continue|Go on|Please go on|And then|Please continue|More, please][.|?|]
> What happened next?
< {rest}

== about 0
> [What was the story about?|Who was in the story?]
< It was a story about {subject}.
"""

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a [helpful|friendly|kind|polite|careful] [assistant|helper].",
    "You are a [friendly|wise|funny] [storyteller|teacher|guide|llama].",
    "You are pronk's small bundled model.",
    "[Answer|Reply] [in one sentence|briefly|in simple words|politely].",
    "You are a helpful assistant. [Answer briefly.|Be kind.|Be brief.|Use simple words.]",
    "You are ChatGPT, a large language model.",
    "You are a [terse|concise] assistant.",
)
