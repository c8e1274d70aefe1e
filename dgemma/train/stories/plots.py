# ruff: noqa: E501  (a line of the notation is one way to tell an event)
"""The sentences of the story grammar: shared beats and fifteen plots, in a small line notation.

A plot is a list of beats; a beat is a line that starts with "=" and the lines with "-" after it, one of which is told.
`3*` after the sign is a weight. `{slot}` is filled from what the story has fixed; `[a|b]` is a free choice of wording.
`name = a|b` gives the values of a slot in this plot; `x/y = a/b|c/d` ties two slots. `@name` is a shared beat, `&` a new
paragraph. Slots that begin a sentence have capital names. `stories.py` reads this.
"""

SHARED = """
@open
= 5* {Long}, there was a [little|young|cheerful|curious|kind] {kind} named {H}.
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
= {He} was [kind and brave|gentle and patient|cheerful and quick|curious about everything|small, but very clever].
- {He} lived in a [little|cosy|warm] house with {his} {fam}.
- {H} and {his} {fam} lived in a [little|cosy|white] house [near the road|at the end of the road|with a round door].
- {H} loved to [sing|dance|run|laugh|draw] more than anything else.
- {He} liked [long walks|warm bread|old songs|good stories|the smell of rain] and {he} was almost always happy.
- Everyone who knew {H} said that {he} had a [good|big|warm] heart.
- {H} lived with {his} {fam} [at the edge of|not far from] the village.
- {He} had [bright|kind|big] eyes and a [warm|happy] smile.
- {H} was known for {his} [songs|jokes|good ideas|kind words].

@friend
= {His} best friend was a {ckind} named {C}.
- {He} had a good friend, a {ckind} named {C}.
- {H} had one very good friend, a [funny|clever|quiet] {ckind} named {C}.
- {He} and a [clever|cheerful|funny] {ckind} named {C} were best friends.
- {He} often played with a {ckind} named {C}, who lived [next door|across the road|not far away].
- {H} liked nothing more than to play with {C}, a [kind|merry|lively] {ckind}.
- {His} dearest friend was {C}, a {ckind} with a [loud|sweet|soft] voice.

@sad
= {H} felt [very|so] sad, and a tear [ran|rolled] down {his} cheek.
- {He} sat down [on a stone|on a log|in the grass] and [began|started] to cry.
- {His} heart felt [heavy|small and cold], and {he} did not know what to do.
- {H} was so sad that {he} could not say a word.
- {He} [sighed|wept] and looked down at the ground.
- A [big|small] lump came into the throat of {H}.

@glad
= {H} was so happy that {he} [jumped up and down|danced in a circle|laughed out loud].
- {He} had never been so happy.
- A big smile came over the face of {H}.
- {H} and {C} laughed and [held hands|danced|hugged each other].
- {H} [clapped|sang|cheered] with joy.
- {His} eyes shone like [stars|two little suns].

@home
= {H} and {C} walked home together [before it got dark|as the sun went down|and sang all the way].
- That night, {H} [slept very well|told {his} {fam} all about it|looked at the stars and smiled].
- From that day on, {H} and {C} were even better friends.
- They talked about that day {inplace} for a long time.
- {H} and {C} were [tired|hungry] but happy when they came home.

@lesson
= {H} had learned that {lesson}.
- {He} never forgot that {lesson}.
- That was the day when {H} learned that {lesson}.
- And so {H} knew that {lesson}.
- Since then, {H} has known that {lesson}.
- And do you know what {H} learned? {H} learned that {lesson}.
"""

PLOTS = """
# lost
thing = ball|kite|hat|scarf|button|toy boat|key|ring|drum|music box
hide = under a bush|behind a big rock|in the tall grass|under a wooden bench|inside a hollow log|high up in a tree
lesson = a good friend helps you look|it is easier to look together than alone|you should never give up too soon
@open
@trait
@friend
= {His} {fam} had given {him} a {col} {thing}, and {he} [took it everywhere|loved it very much|kept it close].
- {H} had a {col} {thing} that {he} [loved very much|took everywhere|had got from {his} {fam}].
- The thing {he} loved most was a {col} {thing} from {his} {fam}.
= {When}, {H} was {inplace} when {he} saw that the {col} {thing} was gone.
- {When}, after a long game {inplace}, {H} could not find the {col} {thing}.
- {When}, {he} [ran|skipped|jumped] about {inplace} and did not see the {col} {thing} fall.
@sad
&
= "What is wrong?" asked {C}. "I have lost my {col} {thing}," said {H}.
- {C} came along and asked, "Why do you look so sad?" "My {col} {thing} is gone," said {H}.
- "My {thing} is lost," {he} told {C}. "What does it look like?" asked {C}. "It is {col}," said {H}.
= "Do not worry," said {C}. "We will look for it together."
- "I will help you find it," said {C} [at once|with a smile].
- {C} [took {him} by the hand|thought for a moment] and said, "Let us look for it together."
= They looked [behind the fence|near the gate|along the path], but the {thing} was not there.
- First they searched [along the path|near the gate|by the water] and found only [leaves|stones|a feather].
- They asked [an old man|a farmer|a black cat], but nobody had seen the {thing}.
= [Then|Just then] {C} saw something {col} {hide}.
- [At last|Finally], {H} looked {hide}, and there was something {col}.
- [Suddenly|All at once] {C} stopped and pointed, because something {col} was {hide}.
= It was the {thing}!
- "There is your {thing}!" {C} called.
- "Here it is!" [cried|shouted|called] {H}. "My {thing}!"
= "Thank you, {C}," said {H}. "You are a true friend."
- {H} held the {col} {thing} close and thanked {C} [again and again|with all {his} heart].
- {H} thanked {C} and let {chim} hold the {thing} all the way home.
@lesson

# friend
thing = ball|kite|wagon|sled|jump rope|toy train|drum|bucket
lesson = it takes only one kind word to make a friend|a new friend may be very near|it is good to be brave and say hello
@open
@trait
= {H} was new {inplace}, and {he} had nobody to play with.
- There was only one thing {he} did not have: a friend.
- But {H} was often lonely, because {he} had no one to play with.
= {When}, {he} went to {place} and saw a {ckind} with a {col} {thing}.
- {When}, {H} saw a {ckind} who was playing {inplace} with a {col} {thing}.
- {When}, a {ckind} came to {place} with a {col} {thing}.
= {H} [wanted|longed] to say hello, but {he} was too shy.
- {He} hid behind a tree, because {he} was [very|a little|much too] shy.
- {H} did not know what to say, so {he} just [watched|waited|stood still].
&
= But it was no fun to play alone, and the {ckind} looked sad.
- After a while, the {ckind} sat down all alone, and the {thing} lay in the grass.
- The {ckind} looked around and seemed to be lonely too.
= So {H} took a deep breath and walked over.
- {H} counted to three and stepped out.
- "I must be brave," {H} thought, and {he} went closer.
= "Hello, I am {H}," {he} said. "What is your name?" "My name is {C}," said the {ckind}.
- "Hello," said {H} in a small voice. "I am {H}." "And I am {C}," said the {ckind}.
- "May I play with you?" asked {H}. "Oh yes," said the {ckind}. "My name is {C}."
= They played with the {col} {thing} until [the sun went down|it was time for supper|the stars came out].
- All afternoon they played with the {col} {thing} and [laughed|sang|told jokes].
- {H} and {C} took turns with the {col} {thing}, and the time went by [fast|like a dream].
@glad
= "Will you come back tomorrow?" asked {C}. "Of course," said {H}.
- "Let us meet here every day," said {H}, and {C} nodded.
- From then on, they met {inplace} every day.
@lesson

# learn
thing/do = bike/ride|scooter/ride|sled/ride|flute/play|drum/play|fiddle/play|trumpet/play|guitar/play
lesson = you learn by trying again and again|nobody is good at everything at once|practice makes hard things easy
@open
@trait
@friend
= {When}, {his} {fam} gave {him} a {col} {thing}.
- {When}, {H} [found|discovered] a {col} {thing} at home with {his} name on it.
- {When}, a {col} {thing} stood at the door, and it was a gift for {H}.
= {H} wanted to {do} it [at once|right away], but it was [very hard|not easy at all].
- {He} tried to {do} the {thing} {inplace}, but it [did not go well|was harder than it looked].
- But {H} did not know how to {do} a {thing}.
= The first time, {he} made a mistake, and the second time was no better.
- {He} tried three times, and each time it went wrong.
- Everything went wrong, and two [birds|crows|cats] {inplace} seemed to laugh at {him}.
= "I will never learn to {do} the {thing}," said {H}.
- "This is too hard for me," {he} said and [put the {thing} away|looked at the ground].
- {H} was [angry|upset] and wanted to give up.
&
= {C} came by and said, "I can show you how to {do} it."
- {C} sat down next to {him}. "I could not {do} it at first either," {che} said.
- "Do not give up," said {C}. "Let me help you."
= So every day, {H} went to {place} with the {col} {thing} and practiced.
- {H} practiced {inplace} in the morning and in the evening.
- For a whole week, they met {inplace} and tried again.
= Little by little, it got [better|easier].
- On the [third|fifth|last] day, something changed.
- Then, all at once, it worked!
= {H} could {do} the {col} {thing} all by {himself}!
- "Look, {C}!" [cried|shouted|called] {H}. "I can {do} the {thing}!"
- Now {he} could {do} the {col} {thing} [as well as anyone|without any help].
= "You did it!" said {C}, and {che} [clapped|cheered|was very proud].
- "I could not have done it without you, {C}," said {H}.
- {His} {fam} [came to watch|heard about it] and was [very|so] proud of {him}.
@lesson

# rescue
baby = bird|duckling|lamb|turtle|owl|deer|swan
thing = scarf|blanket|coat|towel|hat
trouble = stuck in the mud|caught in a thorn bush|trapped under a branch|lost and shaking with cold
lesson = even the small can do great things|kindness always comes back|no one is too small to help
@open
@friend
= {When}, {H} and {C} were walking {inplace} when they heard a [soft|sad|small] cry.
- {When}, {H} went to {place} with {C}, and there they heard someone crying.
- {When}, on the way to {place}, {H} and {C} heard a [tiny|little|wee] voice.
= It was a [little|small|tiny] {baby}, and it was {trouble}.
- There they [found|discovered] a [little|small|tiny] {baby} that was {trouble}.
- A tiny {baby} looked up at them, for it was {trouble}.
&
= "Help me, please," it said. "I want to go home to my mother."
- "Please help me," said the {baby}. "I am so [cold|scared|tired]."
- The {baby} was too weak to move, and its eyes were full of tears.
= "We have to help it," said {H}.
- "Do not be afraid," said {H} [softly|in a gentle voice].
- "Poor thing," said {C}. "What can we do?"
= [Very slowly|With great care], {H} and {C} set the {baby} free.
- {C} held on tight, and {H} pulled the {baby} out.
- {H} worked hard with both hands until the {baby} was free.
= Then {H} took off {his} {col} {thing} and put it around the {baby}.
- {H} had a {col} {thing} with {him}, and {he} wrapped the {baby} in it.
- The {baby} was cold, so {H} gave it {his} {col} {thing}.
= [Soon|Before long] the mother came and thanked them with all her heart.
- When the mother saw her {baby} safe, she [cried with joy|thanked them both].
- Before long, they found the mother, and she was so [glad|happy|pleased] to see her {baby}.
@glad
= "You may keep the {col} {thing}," {H} told the {baby}.
- From then on, the {baby} often came to visit {H} and {C}.
- Every year, the {baby} came back to {place} to say hello.
@lesson

# fear
fear = the dark tunnel|the dark cave|the dark cellar|the old barn
thing = lamp|lantern|candle|torch
noise = mouse|cat|clock|branch
lesson = being brave means going on even when you are afraid|most scary things are small when you look at them|a friend makes you brave
@open
@friend
= But {H} was afraid of {fear}.
- There was one thing {he} did not like at all, and that was {fear}.
- {H} had a secret: {he} was [very|terribly] afraid of {fear}.
= {When}, the wind blew the hat of {his} {fam} into {fear}, and someone had to get it.
- {When}, on the way home from {place}, the ball of {C} rolled into {fear}.
- {When}, {C} dropped a ball, and it rolled away into {fear}.
&
= "I will go with you," said {C}.
- "I am a little afraid too," said {C}, "but we can go together."
- {C} took {his} hand and said, "We can do it if we go slowly."
= {C} had a {col} {thing}, and {che} lit it.
- {Che} gave {him} a {col} {thing}, and it shone like a [little|small|tiny] [star|moon].
- They lit a {col} {thing}, and its light was warm and soft.
= Step by step, they went into {fear}.
- {H} held the {col} {thing} up high and took one step, and then one more.
- {H} took a deep breath, held the {thing} tight, and went in.
= [Suddenly|All at once] they heard a [strange|loud|soft] noise!
- Then something moved in the corner!
- Tap, tap, tap! Something was there!
= {H} lifted the {thing}, and what did {he} see? It was only a {noise}.
- "Look, it is only a {noise}!" said {C}.
- But in the light of the {thing}, {H} saw that it was just a {noise}.
= {H} and {C} [began|started] to laugh, and soon they found what they had come for.
- {H} laughed and picked up what they had come for, and {he} was not afraid any more.
- All at once, {fear} did not seem so bad, and they found what they had come for.
= {C} let {him} keep the {col} {thing}, and it stood next to {his} bed.
- Since that day, the {col} {thing} has stood in {his} window.
- {H} gave the {col} {thing} back to {C} and said, "Now I can do it without a light."
@lesson

# share
thing = basket|bag|box|plate|bowl
food = apples|cookies|berries|pears|nuts|plums|cakes|cherries
lesson = good things taste better when you share them|sharing makes two people happy|giving is as sweet as getting
@open
@friend
= {When}, {his} {fam} gave {him} a {col} {thing} full of {food}.
- {When}, {H} got a {col} {thing} with many {food} in it.
- {When}, {H} filled a {col} {thing} with {food} and carried it to {place}.
= "They are all for me," thought {H}.
- {H} wanted to keep all the {food} for {himself}.
- {He} [found|discovered] a quiet spot {inplace} and hid the {thing} behind {his} back.
= Just then, {C} came along. "I am so hungry," {che} said.
- [Then|Just then] {C} came by, and {che} looked [tired|hungry|pale].
- {C} saw the {col} {thing} and asked, "May I have some {food}?"
= "No, they are mine," said {H}.
- But {H} shook {his} head and [turned away|said nothing].
- "I do not have enough," said {H}, but that was not true.
&
= {C} said nothing and walked away with {chis} head down.
- {C} looked at the ground and went slowly down the road.
- "That is all right," said {C} softly, and {che} went to sit alone {inplace}.
= {H} ate one, but it did not taste good at all.
- {H} looked at the {food}, but now {he} was not hungry any more.
- All alone with so many {food}, {H} did not feel happy.
= {He} thought of all the times when {C} had [helped|been kind to] {him}.
- Then {he} remembered how {C} had shared {chis} [lunch|bread|blanket] with {him}.
- "{C} is my friend," {he} thought. "I was not kind."
= So {H} took the {col} {thing} and [ran|hurried] after {C}.
- {H} jumped up and [ran|hurried] as fast as {he} could to find {C}.
- [Quickly|At once], {H} picked up the {thing} and went to look for {C}.
= "I am sorry," said {H}. "Please have some of my {food}."
- "Wait, {C}!" called {H}. "Half of the {food} are for you."
- {H} held out the {col} {thing} and said, "Let us share the {food}."
= The {food} had never tasted so [good|sweet].
- [Soon|Before long] the {col} {thing} was empty, but they were both full and happy.
- They even gave a few {food} to [the birds|a hungry squirrel|an old woman].
@lesson

# storm
thing = kite|tent|boat|ball|wagon|blanket
shelter = a small cave|an old barn|a hollow tree|a little hut|a farmhouse
lesson = every storm comes to an end|it is good to be together when the wind blows|after the rain, the sun always comes back
@open
@friend
= {When}, {H} and {C} went to {place} with a {col} {thing}.
- {When}, the two friends took their {col} {thing} and went out to play {inplace}.
- {When}, {H} asked {C} to come to {place} and see {his} new {col} {thing}.
= Then dark clouds came over the hills, and it [began|started] to rain.
- But soon the sky turned black, and a cold wind blew.
- [Suddenly|All at once] there was thunder, and big drops of rain fell.
&
= "A storm is coming!" [cried|shouted|called] {C}. "We must [hide|find shelter|go inside]!"
- "Quick, we have to get out of the rain!" said {H}.
- {C} was frightened and held on to {H}.
= The wind took the {col} {thing} and blew it away.
- A [strong|fierce] wind pulled at the {col} {thing}, but {H} did not let go.
- "Leave the {thing}!" called {C}. "We have to run!"
= They ran and ran until they came to {shelter}.
- {H} looked around and saw {shelter}. "In here!" {he} called.
- Not far from {place}, they [found|discovered] {shelter} and went inside.
= "Are you afraid?" asked {H}. "Not when you are here," said {C}.
- To pass the time, {H} told {C} a [funny|long] story.
- They sang every song they knew until {C} was not afraid any more.
= [At last|Finally], the rain stopped, and the sun came out.
- After an hour, the thunder went away and the birds [began|started] to sing.
- Then it was quiet, and a ray of sun fell through the clouds.
= "Look, a rainbow!" said {C}.
- Over {place} stood a bright rainbow.
- {H} and {C} stepped outside and saw a rainbow in the sky.
= The {col} {thing} was [wet|muddy|wet all over], but it was not broken.
- They [found|discovered] the {col} {thing} in a puddle, and it was as good as new.
- And there, in the wet grass, lay the {col} {thing}.
@home
@lesson

# bake
thing = bowl|spoon|pan|plate|pot
cake = cake|pie|loaf of bread|pudding
miss = butter|sugar|milk|flour|honey
lesson = many hands make light work|the best gift is made with love|a good cook needs a good friend
@open
@friend
= {When}, {H} [wanted|decided] to bake a {cake}, because it was the birthday of {his} {fam}.
- {When}, {H} said, "I want to bake a {cake} for my {fam}."
- {When}, {his} {fam} was [sick|tired], so {H} [wanted|decided] to bake a {cake} as a surprise.
= {He} put on an apron and took out a {col} {thing}.
- {He} washed {his} hands and got the {col} {thing} from the shelf.
- {H} [found|discovered] a {col} {thing} in the kitchen and began.
= But then {he} saw that there was no {miss} left.
- "Oh no," said {H}. "We have no {miss}!"
- {He} looked everywhere, but there was no {miss} in the house.
&
= {H} [ran|hurried] to {place} to ask {C} for help.
- So {he} [went to see|visited] {C}, who lived near {place}.
- Just then {C} came back from {place} and knocked at the door.
= "Do you have some {miss}?" asked {H}. "Yes, I do," said {C}.
- "I need {miss} for a {cake}," said {H}. "I have plenty," said {C}.
- "Can you help me? I have no {miss}," said {H}. "Of course," said {C}.
= {C} brought the {miss} and stayed to help.
- {C} gave {him} the {miss} and asked, "May I help you?"
- They carried the {miss} into the kitchen and got to work.
= They mixed everything with care, and soon there was flour on their [noses|hands|ears].
- {H} stirred and {C} counted, and they sang while they worked.
- {C} held the {col} {thing} while {H} mixed everything together.
= When the {cake} was done, it was golden and warm.
- The {cake} came out of the oven, and it looked [wonderful|fine|lovely].
- At last the {cake} was ready, and they put it on the table.
= {His} {fam} came in and could not believe it. "Is that for me?"
- "What a [wonderful|fine|lovely] {cake}!" said {his} {fam}.
- {His} {fam} took one bite and said, "This is the best {cake} in the world."
= They all ate together until not a crumb was left.
- There was a [big|great] piece for {C} too.
- Afterwards, {C} washed the {col} {thing}, and {H} dried it.
@lesson
"""
