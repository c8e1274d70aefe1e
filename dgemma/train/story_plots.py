"""The sentences of the story grammar: shared beats and fifteen plots, in a small line notation.

A plot is a list of beats; a beat is a paragraph of lines that start with "-", one of which is told ("-" alone: nothing is).
`3*` after the dash is a weight. `{slot}` is filled from what the story has fixed; `[a|b]` is a free choice of wording.
`name = a|b` gives the values of a slot in this plot; `x/y = a/b|c/d` ties two slots. `@name` is a shared beat, `&` a new
paragraph. Slots that begin a sentence have capital names. `stories.py` reads this.
"""

SHARED = """
@open
- 5* {Long}, there was a [little|young|cheerful|curious|kind] {kind} named {H}.
- 4* {Long}, a [little|young|clever] {kind} named {H} lived near {place}.
- 3* {Long}, in a [small|quiet|sunny] village, there lived a [little|young|cheerful] {kind} named {H}.
- 2* There was once a [little|young|gentle|cheerful] {kind} named {H}.
- In a small village near {place}, there lived a [little|young|kind] {kind} named {H}.
- Deep in the forest, there lived a [little|young|brave] {kind} named {H}.
- Far away, behind the tall hills, lived a [little|young|merry] {kind} named {H}.
- {One}, a [little|young|curious] {kind} named {H} woke up with a smile.
- 2* {One}, a [little|young|cheerful] {kind} named {H} was playing {inplace}.
- {One}, a [little|young|happy] {kind} named {H} sat at the window and looked outside.

@trait
- {He} was [kind and brave|gentle and patient|cheerful and quick|curious about everything|small, but very clever].
- {He} lived in a [little|cosy|warm] house with {his} {fam}.
- {H} and {his} {fam} lived in a [little|cosy|white] house [near the road|at the end of the road|with a round door].
- {H} loved to [sing|dance|run|laugh|draw] more than anything else.
- {He} liked [long walks|warm bread|old songs|good stories|the smell of rain] and {he} was almost always happy.
- Everyone who knew {H} said that {he} had a [good|big|warm] heart.

@friend
- {His} best friend was a {ckind} named {C}.
- {He} had a good friend, a {ckind} named {C}.
- {H} had one very good friend, a [funny|clever|quiet] {ckind} named {C}.
- {He} and a [clever|cheerful|funny] {ckind} named {C} were best friends.
- {He} often played with a {ckind} named {C}, who lived [next door|across the road|not far away].

@sad
- {H} felt very sad, and a tear ran down {his} cheek.
- {He} sat down [on a stone|on a log|in the grass] and began to cry.
- {His} heart felt [heavy|small and cold], and {he} did not know what to do.
- {H} was so sad that {he} could not say a word.

@glad
- {H} was so happy that {he} [jumped up and down|danced in a circle|laughed out loud].
- {He} had never been so happy.
- A big smile came over the face of {H}.
- {H} and {C} laughed and [held hands|danced|hugged each other].

@home
-
- {H} and {C} walked home together [before it got dark|as the sun went down|and sang all the way].
- That night, {H} [slept very well|told {his} {fam} all about it|looked at the stars and smiled].
- From that day on, {H} and {C} were even better friends.
- They talked about that day {inplace} for a long time.

@lesson
- {H} had learned that {lesson}.
- {He} never forgot that {lesson}.
- That was the day when {H} learned that {lesson}.
- And so {H} knew that {lesson}.
"""

PLOTS = """
# lost
thing = ball|kite|hat|scarf|button|toy boat|key|ring|drum|music box
hide = under a bush|behind a big rock|in the tall grass|under a wooden bench|inside a hollow log|high up in a tree
lesson = a good friend helps you look|it is easier to look together than alone|you should never give up too soon
@open
@trait
@friend

- {His} {fam} had given {him} a {col} {thing}, and {he} [took it everywhere|loved it very much|kept it close].
- {H} had a {col} {thing} that {he} [loved very much|took everywhere|had got from {his} {fam}].
- The thing {he} loved most was a {col} {thing} from {his} {fam}.

- {When}, {H} was {inplace} when {he} saw that the {col} {thing} was gone.
- {When}, after a long game {inplace}, {H} could not find the {col} {thing}.
- {When}, {he} ran about {inplace} and did not see the {col} {thing} fall.
@sad
&
- "What is wrong?" asked {C}. "I have lost my {col} {thing}," said {H}.
- {C} came along and asked, "Why do you look so sad?" "My {col} {thing} is gone," said {H}.
- "My {thing} is lost," {he} told {C}. "What does it look like?" asked {C}. "It is {col}," said {H}.

- "Do not worry," said {C}. "We will look for it together."
- "I will help you find it," said {C} [at once|with a smile].
- {C} [took {him} by the hand|thought for a moment] and said, "Let us look for it together."

- They looked [behind the fence|near the gate|along the path], but the {thing} was not there.
- First they searched [along the path|near the gate|by the water] and found only [leaves|stones|a feather].
- They asked [an old man|a farmer|a black cat], but nobody had seen the {thing}.

- Then {C} saw something {col} {hide}.
- At last, {H} looked {hide}, and there was something {col}.
- Suddenly {C} stopped and pointed, because something {col} was {hide}.

- It was the {thing}!
- "There is your {thing}!" {C} called.
- "Here it is!" cried {H}. "My {thing}!"
@glad

- "Thank you, {C}," said {H}. "You are a true friend."
- {H} held the {col} {thing} close and thanked {C} [again and again|with all {his} heart].
- {H} thanked {C} and let {chim} hold the {thing} all the way home.
@home
@lesson

# friend
thing = ball|kite|swing|sled|jump rope|toy train|drum|bucket
lesson = it takes only one kind word to make a friend|a new friend may be very near|it is good to be brave and say hello
@open
@trait

- {H} was new {inplace}, and {he} had nobody to play with.
- There was only one thing {he} did not have: a friend.
- But {H} was often lonely, because {he} had no one to play with.

- {When}, {he} went to {place} and saw a {ckind} with a {col} {thing}.
- {When}, {H} saw a {ckind} who was playing {inplace} with a {col} {thing}.
- {When}, a {ckind} came to {place} with a {col} {thing}.

- {H} wanted to say hello, but {he} was too shy.
- {He} hid behind a tree, because {he} was very shy.
- {H} did not know what to say, so {he} just [watched|waited|stood still].
&
- Then the {thing} [broke|got stuck], and the {ckind} looked sad.
- After a while, the {ckind} sat down all alone, and the {thing} lay in the grass.
- The {ckind} looked around and seemed to be lonely too.

- So {H} took a deep breath and walked over.
- {H} counted to three and stepped out.
- "I must be brave," {H} thought, and {he} went closer.

- "Hello, I am {H}," {he} said. "What is your name?" "My name is {C}," said the {ckind}.
- "Hello," said {H} in a small voice. "I am {H}." "And I am {C}," said the {ckind}. 
- "May I play with you?" asked {H}. "Oh yes," said the {ckind}. "My name is {C}."

- "Would you like to try my {thing}?" asked {C}.
- {C} smiled and held out the {col} {thing}. "It is more fun with two," {che} said.
- "I was hoping that someone would come," said {C}.

- They played with the {col} {thing} until [the sun went down|it was time for supper|the stars came out].
- All afternoon they played with the {col} {thing} and [laughed|sang|told jokes].
- {H} and {C} took turns with the {col} {thing}, and the time went by [fast|like a dream].
@glad

- "Will you come back tomorrow?" asked {C}. "Of course," said {H}.
- "Let us meet here every day," said {H}, and {C} nodded.
- From then on, they met {inplace} every day.
@home
@lesson

# learn
thing/do = bike/ride|scooter/ride|pony/ride|sled/ride|flute/play|drum/play|fiddle/play|trumpet/play|guitar/play
lesson = you learn by trying again and again|nobody is good at everything at once|practice makes hard things easy
@open
@trait
@friend

- {When}, {his} {fam} gave {him} a {col} {thing}.
- {When}, {H} found a {col} {thing} at home with {his} name on it.
- {When}, a {col} {thing} stood at the door, and it was a gift for {H}.

- {H} wanted to {do} it [at once|right away], but it was [very hard|not easy at all].
- {He} tried to {do} the {thing} {inplace}, but it [did not go well|was harder than it looked].
- But {H} did not know how to {do} a {thing}.

- The first time, {he} made a mistake, and the second time was no better.
- {He} tried three times, and each time it went wrong.
- Everything went wrong, and two [birds|crows|cats] {inplace} seemed to laugh at {him}.

- "I will never learn to {do} the {thing}," said {H}.
- "This is too hard for me," {he} said and [put the {thing} away|looked at the ground].
- {H} was [angry|upset] and wanted to give up.
&
- {C} came by and said, "I can show you how to {do} it."
- {C} sat down next to {him}. "I could not {do} it at first either," {che} said.
- "Do not give up," said {C}. "Let me help you."

- "Go slowly," said {C}, "and do not be afraid."
- {Che} showed {him} [how to begin|what to do first], and {H} listened [well|with care].
- {C} stayed with {him} and told {him} what to do.

- So every day, {H} went to {place} with the {col} {thing} and practiced.
- {H} practiced {inplace} in the morning and in the evening.
- For a whole week, they met {inplace} and tried again.

- Little by little, it got [better|easier].
- On the [third|fifth|last] day, something changed.
- Then, all at once, it worked!

- {H} could {do} the {col} {thing} all by {himself}!
- "Look, {C}!" cried {H}. "I can {do} the {thing}!"
- Now {he} could {do} the {col} {thing} [as well as anyone|without any help].
@glad

- "You did it!" said {C}, and {che} [clapped|cheered|was very proud].
- "I could not have done it without you, {C}," said {H}.
- {His} {fam} [came to watch|heard about it] and was very proud of {him}.
@home
@lesson

# rescue
baby = bird|duckling|lamb|turtle|owl|deer|swan
thing = scarf|blanket|coat|towel|hat
trouble = stuck in the mud|caught in a thorn bush|trapped under a branch|lost and shaking with cold
lesson = even the small can do great things|kindness always comes back|no one is too small to help
@open
@trait
@friend

- {When}, {H} and {C} were walking {inplace} when they heard a [soft|sad|small] cry.
- {When}, {H} went to {place} with {C}, and there they heard someone crying.
- {When}, on the way to {place}, {H} and {C} heard a tiny voice.

- "Did you hear that?" asked {H}. "Yes," said {C}. "Someone needs help."
- "Who is there?" called {H}.
- They stood still and listened, and then they followed the sound.

- It was a little {baby}, and it was {trouble}.
- There they found a little {baby} that was {trouble}.
- A tiny {baby} looked up at them, for it was {trouble}.
&
- "Help me, please," it said. "I want to go home to my mother."
- "Please help me," said the {baby}. "I am so [cold|scared|tired]."
- The {baby} was too weak to move, and its eyes were full of tears.

- "We have to help it," said {H}.
- "Do not be afraid," said {H} [softly|in a gentle voice].
- "Poor thing," said {C}. "What can we do?"

- [Very slowly|With great care], {H} and {C} set the {baby} free.
- {C} held the branches, and {H} pulled the {baby} out.
- {H} worked hard with both hands until the {baby} was free.

- Then {H} took off {his} {col} {thing} and put it around the {baby}.
- {H} had a {col} {thing} with {him}, and {he} wrapped the {baby} in it.
- The {baby} was cold, so {H} gave it {his} {col} {thing}.

- They carried it home, and {his} {fam} gave it [warm milk|some soup|bread and water].
- They gave it some [water|milk|bread] and looked for its mother.
- {C} sang a song to the {baby} while {H} looked for its mother.

- Soon the mother came and thanked them with all her heart.
- When the mother saw her {baby} safe, she [cried with joy|thanked them both].
- Before long, they found the mother, and she was so glad to see her {baby}.
@glad

- "You may keep the {col} {thing}," {H} told the {baby}.
- From then on, the {baby} often came to visit {H} and {C}.
- Every year, the {baby} came back to {place} to say hello.
@home
@lesson

# fear
fear/dark = the dark/dark|the dark cellar/dark|the old attic/dark|the long tunnel/dark
thing = lamp|lantern|candle|torch
noise = mouse|cat|clock|branch
lesson = being brave means going on even when you are afraid|most scary things are small when you look at them|a friend makes you brave
@open
@trait
@friend

- But {H} was afraid of {fear}.
- There was one thing {he} did not like at all, and that was {fear}.
- {H} had a secret: {he} was very afraid of {fear}.

- {When}, {his} {fam} lost a {col} {thing} there, and someone had to get it.
- {When}, after a walk to {place}, {H} had to go through {fear} to get home.
- {When}, {C} dropped a ball, and it rolled away into {fear}.

- {H} stood still, and {his} knees began to shake.
- "I cannot go in there," said {H}. "It is too {dark}."
- {H} wanted to run away.
&
- "I will go with you," said {C}.
- "I am a little afraid too," said {C}, "but we can go together."
- {C} took {his} hand and said, "We can do it if we go slowly."

- {C} had a {col} {thing}, and {che} lit it.
- {Che} gave {him} a {col} {thing}, and it shone like a little [star|moon].
- They lit a {col} {thing}, and its light was warm and soft.

- Step by step, they went into {fear}.
- {H} held the {col} {thing} up high and took one step, and then one more.
- {H} took a deep breath, held the {thing} tight, and went in.

- Suddenly they heard a [strange|loud|soft] noise!
- Then something moved in the corner!
- Tap, tap, tap! Something was there!

- {H} lifted the {thing}, and what did {he} see? It was only a {noise}.
- "Look, it is only a {noise}!" said {C}.
- But in the light of the {thing}, {H} saw that it was just a {noise}.

- {H} and {C} began to laugh, and the fear was gone.
- {H} laughed, and {he} was not afraid any more.
- All at once, {fear} did not seem so bad.

- "You were very brave," said {C}.
- {His} {fam} heard the story and was very proud of {him}.
- On the way to {place}, {H} told everyone how brave {C} had been.
- The next day, they went to {place} and told all their friends about it.
@glad

- {H} kept the {col} {thing} next to {his} bed.
- Since that day, the {col} {thing} has stood in {his} window.
- {H} gave the {col} {thing} back to {C} and said, "Now I can do it without a light."
@home
@lesson

# share
thing = basket|bag|box|plate|bowl
food = apples|cookies|berries|pears|nuts|plums|cakes|cherries
lesson = good things taste better when you share them|sharing makes two people happy|giving is as sweet as getting
@open
@trait
@friend

- {When}, {his} {fam} gave {him} a {col} {thing} full of {food}.
- {When}, {H} got a {col} {thing} with many {food} in it.
- {When}, {H} filled a {col} {thing} with {food} and carried it to {place}.

- "They are all for me," thought {H}.
- {H} wanted to keep all the {food} for {himself}.
- {He} found a quiet spot {inplace} and hid the {thing} behind {his} back.

- Just then, {C} came along. "I am so hungry," {che} said.
- Then {C} came by, and {che} looked [tired|hungry|pale].
- {C} saw the {col} {thing} and asked, "May I have some {food}?"

- "No, they are mine," said {H}.
- But {H} shook {his} head and [turned away|said nothing].
- "I do not have enough," said {H}, but that was not true.
&
- {C} said nothing and walked away with {chis} head down.
- {C} looked at the ground and went slowly to {place}.
- "That is all right," said {C} softly, and {che} went to sit alone {inplace}.

- {H} ate one, but it did not taste good at all.
- {H} looked at the {food}, but now {he} was not hungry any more.
- All alone with so many {food}, {H} did not feel happy.

- {He} thought of all the times when {C} had [helped|been kind to] {him}.
- Then {he} remembered how {C} had shared {chis} [lunch|bread|blanket] with {him}.
- "{C} is my friend," {he} thought. "I was not kind."

- So {H} took the {col} {thing} and ran after {C}.
- {H} jumped up and ran as fast as {he} could to find {C}.
- Quickly, {H} picked up the {thing} and went to look for {C}.

- "I am sorry," said {H}. "Please have some of my {food}."
- "Wait, {C}!" called {H}. "Half of the {food} are for you."
- {H} held out the {col} {thing} and said, "Let us share the {food}."

- {C} smiled [at once|from ear to ear], and they sat down side by side.
- "Thank you, {H}," said {C}. "That is very kind of you."
- They sat down {inplace} and ate the {food} together.

- The {food} had never tasted so [good|sweet].
- Soon the {col} {thing} was empty, but they were both full and happy.
- They even gave a few {food} to [the birds|a hungry squirrel|an old woman].
@glad
@home
@lesson

# storm
thing = umbrella|tent|boat|coat|wagon
shelter = a small cave|an old barn|a hollow tree|a little hut|a farmhouse
lesson = every storm comes to an end|it is good to be together when the wind blows|after the rain, the sun always comes back
@open
@friend

- {When}, {H} and {C} went to {place} with a {col} {thing}.
- {When}, the two friends took their {col} {thing} and went out to play {inplace}.
- {When}, {H} asked {C} to come to {place} and see {his} new {col} {thing}.

- The sky was blue, and they [sang|played|ran about] for a long time.
- They played all morning and did not look at the sky.
- At first the day was warm and the wind was soft.

- Then dark clouds came over the hills, and it began to rain.
- But soon the sky turned black, and a cold wind blew.
- Suddenly there was thunder, and big drops of rain fell.
&
- "A storm is coming!" cried {C}. "We must [hide|find shelter|go inside]!"
- "Quick, we have to get out of the rain!" said {H}.
- {C} was frightened and held on to {H}.

- The wind took the {col} {thing} and blew it away.
- A strong wind pulled at the {col} {thing}, but {H} did not let go.
- "Leave the {thing}!" called {C}. "We have to run!"

- They ran and ran until they came to {shelter}.
- {H} looked around and saw {shelter}. "In here!" {he} called.
- Not far from {place}, they found {shelter} and went inside.

- It was dry and warm there.
- They were wet and cold, but they were safe.
- Inside, they sat close together and listened to the rain.

- "Are you afraid?" asked {H}. "Not when you are here," said {C}.
- To pass the time, {H} told {C} a [funny|long] story.
- They sang every song they knew until {C} was not afraid any more.

- At last, the rain stopped, and the sun came out.
- After an hour, the thunder went away and the birds began to sing.
- Then it was quiet, and a ray of sun fell through the clouds.

- "Look, a rainbow!" said {C}.
- Over {place} stood a bright rainbow.
- {H} and {C} stepped outside and saw a rainbow in the sky.

- The {col} {thing} was [wet|full of water], but it was not broken.
- They found the {col} {thing} in a puddle, and it was as good as new.
- And there, in the wet grass, lay the {col} {thing}.
@glad
@home
@lesson

# bake
thing = bowl|spoon|pan|plate|apron
cake = cake|pie|loaf of bread|pudding
miss = eggs|butter|sugar|milk|flour|honey
lesson = many hands make light work|the best gift is made with love|a good cook needs a good friend
@open
@trait
@friend

- {When}, {H} wanted to bake a {cake}, because it was the birthday of {his} {fam}.
- {When}, {H} said, "I want to bake a {cake} for my {fam}."
- {When}, {his} {fam} was [sick|tired], so {H} wanted to bake a {cake} as a surprise.

- {He} put on an apron and took out a {col} {thing}.
- {He} washed {his} hands and got the {col} {thing} from the shelf.
- {H} found a {col} {thing} in the kitchen and began.

- But then {he} saw that there was no {miss} left.
- "Oh no," said {H}. "We have no {miss}!"
- {He} looked everywhere, but there was no {miss} in the house.
&
- {H} ran to {place} to ask {C} for help.
- So {he} went to see {C}, who lived near {place}.
- Just then {C} came back from {place} and knocked at the door.

- "Do you have some {miss}?" asked {H}. "Yes, I do," said {C}.
- "I need {miss} for a {cake}," said {H}. "I have plenty," said {C}.
- "Can you help me? I have no {miss}," said {H}. "Of course," said {C}.

- {C} brought the {miss} and stayed to help.
- {C} gave {him} the {miss} and asked, "May I help you?"
- They carried the {miss} into the kitchen and got to work.

- They mixed everything with care, and soon there was flour on their [noses|hands|ears].
- {H} stirred and {C} counted, and they sang while they worked.
- {C} held the {col} {thing} while {H} mixed everything together.

- Then they put the {cake} into the oven and waited.
- The {cake} went into the hot oven.
- Soon a sweet smell filled the house.

- When the {cake} was done, it was golden and warm.
- The {cake} came out of the oven, and it looked wonderful.
- At last the {cake} was ready, and they put it on the table.

- {His} {fam} came in and could not believe it. "Is that for me?" 
- "What a wonderful {cake}!" said {his} {fam}.
- {His} {fam} took one bite and said, "This is the best {cake} in the world."
@glad

- They all ate together until not a crumb was left.
- There was a big piece for {C} too.
- Afterwards, {C} washed the {col} {thing}, and {H} dried it.
@home
@lesson
"""

MORE_PLOTS = """
# garden
thing = pot|bucket|watering can|shovel|basket
plant = sunflower|rose|apple tree|tomato|pumpkin|bean
lesson = good things take time|those who wait with love are rewarded|small seeds can become great things
@open
@trait
@friend

- {When}, {his} {fam} gave {him} a tiny seed.
- {When}, {H} found a little seed {inplace}.
- {When}, {H} came home from {place} with a small seed in {his} hand.

- "What will it be?" asked {C}. "We have to wait and see," said {H}.
- "If you care for it, it will grow," said {his} {fam}.
- "I will plant it and care for it," said {H}.

- {H} got a {col} {thing}, and together they planted the seed {inplace}.
- {H} dug a small hole {inplace}, and {C} brought the {col} {thing}.
- They took a {col} {thing} and went to plant the seed {inplace}.

- The next day, {H} looked, but there was nothing to see.
- One day went by, and then two, but nothing happened.
- Every morning {he} ran to look, but the ground was bare.
&
- "Maybe it is a bad seed," said {H}.
- "It will never grow," said {H}, and {he} wanted to give up.
- {H} was [sad|not very patient] and kicked a stone.

- "You must be patient," said {C}. "It is still asleep."
- "Give it some time," said {C}. "I will help you."
- But {C} said, "Let us wait a little longer."

- So they gave it water every day and kept the [birds|snails|crows] away.
- Every evening, {H} carried water in the {col} {thing}, and {C} sang to the seed.
- {H} came with the {col} {thing} each morning, in sun and in rain.

- Then, one warm day, a small green leaf came out of the ground.
- One morning, {C} called, "Come quickly!" Something green was there.
- At last, a tiny green tip looked out of the earth.

- It grew and grew, and by summer it was a beautiful {plant}.
- Week after week it grew, until it was a tall and strong {plant}.
- It got bigger every day, and in the end it was a fine {plant}.
@glad

- "Look what we have done," said {H} to {C}.
- {H} put the {col} {thing} down and looked at the {plant} with pride.
- Everyone came to see the {plant} and said how lovely it was.
@home
@lesson

# trip
thing = wagon|boat|train|bus|sled|balloon|bag
guide = turtle|farmer|fisherman|goose|shepherd
lesson = it is never wrong to ask for help|the way is short when you go with a friend|the best part of a trip is the one who goes with you
@open
@friend

- {When}, {H} and {C} wanted to see {place}, because they had never been there.
- {When}, {H} said to {C}, "Let us take a trip to {place}."
- {When}, the sun was warm, so {H} asked {C} to go to {place} with {him}.

- They packed [bread and cheese|apples and nuts|cookies and milk] and took a {col} {thing}.
- {H} had a {col} {thing}, and {C} brought [a map|a basket of food|some sandwiches].
- {His} {fam} gave them some food and a {col} {thing} for the way.

- They went over a bridge and past [a mill|a field of corn|three cows], and they sang as they went.
- It was a long way, but they told each other [stories|jokes|riddles].
- The {col} {thing} made the way easy, and they laughed a lot.

- But soon they came to a place where the road split in two.
- After an hour, {H} stopped. "I do not know this road," {he} said.
- Then the fog came, and they could not see the way.
&
- "Are we lost?" asked {C}. "I think so," said {H}.
- {C} looked worried, and {H} did not know what to do.
- "Left or right?" asked {H}, but {C} did not know.

- Just then an old {guide} came down the road.
- Under a tree sat a friendly {guide}.
- Then they saw a {guide} who was resting by the road.

- "Can you tell us the way to {place}?" asked {H}.
- "Please, how do we get to {place}?" asked {C}.
- "We want to go to {place}," said {H}, "but we have lost our way."

- "Follow the little stream," said the {guide}, "and you will be there soon."
- "Go past the tall tree and then turn left," said the {guide}.
- "It is just behind that hill," said the {guide} with a smile.

- They thanked the {guide} and gave {it} an apple.
- "Thank you!" they said, and they went on with the {col} {thing}.
- {H} thanked the {guide}, and off they went.

- Soon they came to {place}, and it was even more beautiful than they had thought.
- And there it was! They had come to {place} at last.
- Before noon, they were there, and {C} [jumped|cheered|shouted] with joy.

- They sat down {inplace} next to the {col} {thing} and ate their lunch.
- They had a picnic {inplace} and played until evening.
- All afternoon, {H} and {C} [climbed|played|ran and jumped] {inplace}.
@glad
@home
@lesson

# truth
thing = vase|cup|teapot|plate|lamp|jar
lesson = it is always best to tell the truth|the truth makes your heart light|we all make mistakes, and we can say sorry
@open
@trait
@friend

- {His} {fam} had a {col} {thing} that was very [old|pretty] and dear to {him_f}.
- In the house stood a {col} {thing}, and it belonged to {his} {fam}.
- On the table stood a {col} {thing} that {his} {fam} had bought near {place}.

- {When}, {H} and {C} played catch inside, and the ball hit the {col} {thing}.
- {When}, {H} came home from {place}, ran through the room, and bumped into the {col} {thing}.
- {When}, while {his} {fam} was {inplace}, {H} danced around and knocked over the {col} {thing}.

- Crash! The {thing} fell down and broke.
- It fell to the floor and broke into [two|three|many] pieces.
- There was a loud crash, and then it was very quiet.
&
- "Oh no," said {H}. "What have I done?"
- {H} turned pale, and {his} heart beat fast.
- {H} looked at the pieces and wanted to cry.

- {He} hid the pieces under the bed and told nobody.
- "Maybe no one will see it," {he} thought, and {he} hid the pieces in a box.
- Quickly, {he} put the pieces into a bag and ran outside.

- But {H} could not play, and {he} could not eat.
- All day long, {H} thought of the {col} {thing}, and {his} stomach hurt.
- But the secret was heavy, and {H} could not be happy.

- "You should tell the truth," said {C}.
- "What is wrong?" asked {C}, and {H} told {chim} everything. "Go and say it," said {C}.
- {C} saw that {he} was sad. "I will come with you," {che} said.

- So {H} went to {his} {fam} and said, "I broke the {col} {thing}. I am very sorry."
- {H} took a deep breath and told {his} {fam} what had happened to the {thing}.
- In the evening, {H} brought the pieces to {his} {fam}. "It was me," {he} said.

- {His} {fam} was quiet for a moment and then smiled. "Thank you for telling me," {Fhe_said}.
- {His} {fam} hugged {him}. "You are more important than a {thing}," {Fhe_said}.
- "I am glad that you told me," said {his} {fam} and hugged {him}.

- Together they glued the {col} {thing}, and soon it was almost as good as before.
- {H} and {C} fixed the {thing} with glue, and it looked funny but nice.
- The next day, {H} went to {place} with {C} to find a new {thing}, and it was {col} too.
@glad
@home
@lesson

# race
thing = sled|bike|scooter|boat|wagon
prize = a big cake|a shiny cup|a bag of sweets|a ribbon
lesson = helping a friend is better than winning|a good friend is worth more than a prize|winning is not everything
@open
@trait
@friend

- {When}, there was a race {inplace}, and the prize was {prize}.
- {When}, everyone came to {place} for the great race, and the winner would get {prize}.
- {When}, {H} heard about a race to {place}, and the prize was {prize}.

- {H} had a {col} {thing}, and {he} wanted to win.
- "I will win with my {col} {thing}," said {H}.
- All week long, {H} had worked on {his} {col} {thing}.

- {C} was in the race too. "Good luck!" {che} said.
- {C} came with {chis} own {thing} and stood next to {him}.
- "Let us both do our best," said {C}.
&
- One, two, three, go! They were off.
- A bell rang, and the race began.
- Someone called, "Go!" and they all went off as fast as they could.

- Soon {H} was in front, and the {col} {thing} flew like the wind.
- The {col} {thing} was very fast, and {H} passed one after the other.
- {H} went faster and faster, and only {C} was near {him}.

- Then {H} heard a cry, and {he} looked back.
- But suddenly there was a loud bump behind {him}.
- "Ouch!" cried someone behind {him}.

- {C} had [fallen|hit a rock] and could not get up.
- {C} lay on the ground and held {chis} [knee|foot|arm].
- It was {C}, and {che} was hurt.

- {H} could see the end of the race, but {he} stopped and turned around.
- {H} did not think about the prize any more and went back to {C}.
- "{C} needs me," thought {H}, and {he} stopped the {thing} at once.

- "Go on, or you will lose!" said {C}. "You are my friend," said {H}.
- "You could have won," said {C}. "I do not want to win without you," said {H}.
- "Can you stand up?" asked {H}. "Only if you help me," said {C}.

- {H} put {C} on the {col} {thing}, and they went on together.
- {He} helped {C} up, and side by side they walked to the end.
- So they both sat on the {col} {thing} and came in last.

- Everyone clapped, and they both got {prize}.
- The people cheered, and {H} and {C} got {prize} for being so kind.
- They did not win, but all the people clapped for {H}.
@glad
@home
@lesson

# build
thing/part = tree house/roof|raft/sail|snowman/hat|sand castle/flag|bird house/roof|little hut/door
lesson = if it falls down, you can build it again|two can do what one cannot|a good plan makes hard work easy
@open
@trait
@friend

- {When}, {H} wanted to build a {thing} {inplace}.
- {When}, {H} had an idea. "I will build a {thing} near {place}," {he} said.
- {When}, {H} went to {place} and began to build a {thing}.

- {He} worked all morning and did not want any help.
- "I can do it alone," {he} told {C}.
- "May I help?" asked {C}. "No, I can do it by myself," said {H}.

- But {H} worked too fast, and the {thing} fell down.
- Then came a gust of wind, and the whole {thing} fell over.
- It grew and grew, but then it shook and fell to the ground.
&
- "All that work for nothing," said {H}.
- {H} looked at the mess and sat down with a sigh.
- {He} was so [angry|upset] that {he} kicked the ground.

- {C} did not laugh. "Let us try again together," {che} said.
- "That was a good start," said {C}. "Shall we make it stronger?"
- {C} came closer and asked, "May I help you now?" {H} nodded.

- First they drew a plan in the sand.
- First they made a list and thought about every part.
- "We need to start with a strong base," said {C}.

- {H} brought [sticks|ropes|stones], and {C} put everything in its place.
- {C} held everything still while {H} did the rest.
- They carried and lifted and pushed, and nobody got tired.

- "It needs some colour," said {C}, so they gave it a {col} {part}.
- At the end, {H} made a {col} {part} for the {thing}.
- {C} had brought a {col} {part}, and it fit very well.

- By evening the {thing} was ready, and it stood firm.
- At last, the {thing} was done, and not even the wind could hurt it.
- When the sun went down, they had the best {thing} {inplace}.
@glad

- "We make a good team," said {H}.
- "It is so much better than before," said {H}. "Thank you, {C}."
- Everyone came to see the {thing} with the {col} {part}.
@home
@lesson

# gift
thing = scarf|hat|card|box|necklace|painting|toy horse|pillow
shopthing = watch|crown|clock|doll|toy castle
lesson = the best gifts come from the heart|a gift does not have to cost a lot|love is worth more than money
@open
@trait
@friend

- {When}, {H} remembered that it was almost the birthday of {C}.
- {When}, {C} said, "Tomorrow is my birthday."
- {When}, {H} heard that {C} would have a birthday party {inplace}.

- {H} wanted to buy {chim} a {shopthing}, but {he} had no money.
- In a shop near {place}, {he} saw a fine {shopthing}, but it cost too much.
- "I want to give {chim} a {shopthing}," thought {H}, but {he} had only one coin.
@sad
&
- {His} {fam} saw it and said, "You can make something by yourself."
- "Why do you not make a gift?" asked {his} {fam}.
- Then {he} had an idea. "I will make something," {he} said.

- So {H} took what {he} could find and began to make a {col} {thing}.
- {His} {fam} showed {him} how to make a {col} {thing}.
- {H} sat down at the table and made a {col} {thing}.

- It took [all day|all evening|many hours], and {his} fingers hurt, but {he} did not stop.
- It was not easy, and twice {he} had to begin again.
- {He} worked until late at night and made it as pretty as {he} could.

- The next day, {H} went to {place} with the {col} {thing}.
- In the morning, {H} wrapped up the {thing} and went to see {C}.
- Then the day of the party came, and {H} gave {C} the {col} {thing}.

- "I made it for you," {he} said [in a small voice|and looked at {his} feet].
- "Happy birthday, {C}," said {H}. "It is only a small gift."
- {H} was afraid that {C} would not like it.

- But {C} looked at the {thing} and smiled. "You made this for me?"
- {C} opened it, and {chis} eyes began to shine.
- "A {col} {thing}!" cried {C}. "It is so beautiful!"

- "It is the best gift of all," {che} said.
- "I will keep it for ever," said {C}.
- {C} hugged {him} and kept the {col} {thing} close all day.
@glad
@home
@lesson

# noise
baby = kitten|puppy|owl|mouse|bird|frog
spot = in the old barn|under the stairs|behind the door|in the attic|under the bed
thing = lamp|blanket|box|basket|coat
lesson = you should look before you are afraid|a strange noise may be a new friend|most scary things are only lonely
@open
@trait
@friend

- {When}, after a long day {inplace}, {H} heard a strange noise {spot}.
- {When}, {H} and {C} came home from {place} and heard a strange noise {spot}.
- {When}, it was raining {inplace}, so {H} and {C} stayed inside, and they heard a noise {spot}.

- "Who can that be?" asked {H}.
- Scratch, scratch, scratch, it went.
- It sounded like someone who was [crying|knocking|whispering].

- "Maybe it is a [monster|ghost|dragon]," said {C}, and {che} turned pale.
- {C} was afraid and hid behind {H}.
- "Let us run away," said {C}.
&
- But {H} wanted to know what it was.
- "No, let us go and look," said {H}.
- {H} was afraid too, but {he} was also curious.

- {He} took a {col} {thing} and went closer, step by step.
- {H} picked up a {col} {thing}, and {C} held on to {him}.
- "Give me the {col} {thing}," {he} said, and slowly they went on.

- There it was again, and now it was very near.
- The noise got louder, and {C} held {chis} breath.
- They did not make a sound, and they listened.

- Then {H} looked {spot} and began to laugh.
- "I can see it," said {H}. "It is not a monster at all!"
- {H} counted to three and looked.

- It was only a little {baby}!
- There sat a tiny {baby}, and it was more afraid than they were.
- Two big eyes looked up at them, and they belonged to a {baby}.

- "You poor little {baby}," said {C}. "Are you all alone?"
- "Do not be afraid," said {H}. "We will take care of you."
- The {baby} was hungry, so {C} gave it some [milk|bread|cheese].

- {H} made a soft bed for it with the {col} {thing}.
- They put the {baby} next to the {col} {thing}, where it was warm.
- Soon the {baby} fell asleep beside the {col} {thing}.
@glad

- The next day, they showed the {baby} to everyone {inplace}.
- From then on, the {baby} went with them when they walked to {place}.
- In the morning, they took the {baby} to {place} to play.
@home
@lesson
"""
