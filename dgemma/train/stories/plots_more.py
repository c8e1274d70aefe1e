# ruff: noqa: E501  (a line of the notation is one way to tell an event)
"""More plots of the story grammar, in the notation of `plots.py`."""

MORE_PLOTS = """
# garden
thing = pot|bucket|jug|can|pail
plant = sunflower|rose bush|apple tree|cherry tree|pumpkin|tulip
lesson = good things take time|those who wait with love are rewarded|small seeds can become great things
@open
@trait
@friend
= {When}, {his} {fam} gave {him} a [tiny|little|wee] seed.
- {When}, {H} [found|discovered] a [little|small|tiny] seed {inplace}.
- {When}, {H} came home from {place} with a small seed in {his} hand.
= {H} got a {col} {thing}, and together they planted the seed {inplace}.
- {H} dug a small hole {inplace}, and {C} brought the {col} {thing}.
- They took a {col} {thing} and went to plant the seed {inplace}.
= The next [day|morning], {H} looked, but there was nothing to see.
- One day went by, and then two, but nothing happened.
- Every morning {he} [ran|came] to look, but the ground was bare.
&
= "You must be patient," said {C}. "It is still asleep."
- "Give it some time," said {C}. "I will help you."
- But {C} said, "Let us wait a little longer."
= So they gave it water every day and kept the [birds|snails|crows] away.
- Every evening, {H} carried water in the {col} {thing}, and {C} sang to the seed.
- {H} came with the {col} {thing} each morning, in sun and in rain.
= Then, one warm day, a small green leaf came out of the ground.
- One morning, {C} called, "Come quickly!" Something green was there.
- [At last|Finally], a [tiny|little|wee] green tip looked out of the earth.
= It grew and grew, and by summer it was a [beautiful|lovely] {plant}.
- Week after week it grew, until it was a tall and strong {plant}.
- It got bigger every day, and in the end it was a fine {plant}.
@glad
= "Look what we have done," said {H} to {C}.
- {H} put the {col} {thing} down and looked at the {plant} with pride.
- Everyone came to see the {plant} and said how lovely it was.
@lesson

# trip
thing = wagon|cart|bike|scooter
goal = the great lake|the white castle|the blue mountain|the lighthouse|the waterfall|the old tower|the rose garden
guide = turtle|farmer|fisherman|goose|shepherd
lesson = it is never wrong to ask for help|the way is short when you go with a friend|the best part of a trip is the one who goes with you
@open
@friend
= {When}, {H} and {C} [wanted|hoped] to see {goal}, because they had never been there.
- {When}, {H} said to {C}, "Let us take a trip to {goal}."
- {When}, the sun was warm, so {H} asked {C} to go to {goal} with {him}.
= They packed [bread and cheese|apples and nuts|cookies and milk] and took a {col} {thing}.
- {H} had a {col} {thing}, and {C} brought [a map|a basket of food|some sandwiches].
- {His} {fam} gave them some food and a {col} {thing} for the way.
= But soon they came to a place where the road split in two.
- After an hour, {H} stopped. "I do not know this road," {he} said.
- Then the fog came, and they could not see the way.
&
= Just then an old {guide} came down the road.
- Under a tree sat a [friendly|kind|wise] {guide}.
- Then they saw a {guide} who was resting by the road.
= "Can you tell us the way to {goal}?" asked {H}.
- "Please, how do we get to {goal}?" asked {C}.
- "We want to go to {goal}," said {H}, "but we have lost our way."
= "Follow the little stream," said the {guide}, "and you will be there soon."
- "Go past the tall tree and then turn left," said the {guide}.
- "It is just behind that hill," said the {guide} with a smile.
= They thanked the {guide} and waved until they could not see the {guide} any more.
- "Thank you!" they said, and they went on with the {col} {thing}.
- {H} thanked the {guide}, and off they went.
= [Soon|Before long] they came to {goal}, and it was even more [beautiful|lovely] than they had thought.
- And there it was! They had come to {goal} at last.
- Before noon, they were there, and {C} [jumped|cheered|shouted] with joy.
= They sat down near {goal} next to the {col} {thing} and ate their lunch.
- They had a picnic near {goal} and played until evening.
- All afternoon, {H} and {C} [climbed|played|ran and jumped] near {goal}.
@lesson

# truth
thing = vase|cup|teapot|plate|lamp|jar
lesson = it is always best to tell the truth|the truth makes your heart light|we all make mistakes, and we can say sorry
@open
@friend
= {His} {fam} had a {col} {thing} that was very [old|pretty] and dear to everyone.
- In the house stood a {col} {thing}, and it belonged to {his} {fam}.
- On the table stood a {col} {thing} that {his} {fam} had bought near {place}.
= {When}, {H} and {C} played catch inside, and the ball hit the {col} {thing}.
- {When}, {H} came home from {place}, ran through the room, and bumped into the {col} {thing}.
- {When}, while {his} {fam} was {inplace}, {H} danced around and knocked over the {col} {thing}.
= Crash! The {thing} fell down and broke.
- It fell to the floor and broke into [two|three|many] pieces.
- There was a loud crash, and then it was very, very quiet.
&
= {He} hid the pieces under the bed and told nobody.
- "Maybe no one will see it," {he} thought, and {he} hid the pieces in a box.
- [Quickly|At once], {he} put the pieces into a bag and [ran|hurried] outside.
= But {H} could not play, and {he} could not eat.
- All day long, {H} thought of the {col} {thing}, and {his} stomach hurt.
- But the secret was heavy, and {H} could not be happy.
= "You should tell the truth," said {C}.
- "What is wrong?" asked {C}, and {H} told {chim} everything. "Go and say it," said {C}.
- {C} saw that {he} was sad. "I will come with you," {che} said.
= So {H} went to {his} {fam} and said, "I broke the {col} {thing}. I am [very|so] sorry."
- {H} took a deep breath and told {his} {fam} what had happened to the {thing}.
- In the evening, {H} brought the pieces to {his} {fam}. "It was me," {he} said.
= {His} {fam} was quiet for a moment and then smiled. "Thank you for telling me," {fhe} said.
- {His} {fam} hugged {him}. "You are more important than a {thing}," {fhe} said.
- "I am glad that you told me," said {his} {fam} and hugged {him}.
= Together they glued the {col} {thing}, and soon it was almost as good as before.
- {H} and {C} fixed the {thing} with glue, and it looked funny but nice.
- The next [day|morning], {H} went to {place} with {C} to find a new {thing}, and it was {col} too.
@lesson

# race
thing = sled|bike|scooter|boat|wagon
prize = a big cake|a shiny cup|a bag of sweets|a ribbon
lesson = helping a friend is better than winning|a good friend is worth more than a prize|winning is not everything
@open
@friend
= {When}, there was a race {inplace}, and the prize was {prize}.
- {When}, everyone came to {place} for the great race, and the winner would get {prize}.
- {When}, {H} heard about a race to {place}, and the prize was {prize}.
= {H} had a {col} {thing}, and {he} [wanted|hoped] to win.
- "I will win with my {col} {thing}," said {H}.
- All week long, {H} had worked on {his} {col} {thing}.
= {C} was in the race too. "Good luck!" {che} said.
- {C} came with {chis} own {thing} and stood next to {him}.
- "Let us both do our best," said {C}.
&
= [Soon|Before long] {H} was in front, and the {col} {thing} flew like the wind.
- The {col} {thing} was [very|so] fast, and {H} passed one after the other.
- {H} went faster and faster, and only {C} was near {him}.
= Then {H} heard a cry, and {he} looked back.
- But suddenly there was a loud bump behind {him}.
- "Ouch!" [cried|shouted|called] someone behind {him}.
= {C} had [fallen|hit a rock] and could not get up.
- {C} lay on the ground and held {chis} [knee|foot|arm].
- It was {C}, and {che} was hurt.
= {H} could see the end of the race, but {he} stopped and turned around.
- {H} did not think about the prize any more and went back to {C}.
- "{C} needs me," thought {H}, and {he} stopped the {thing} at once.
= "Go on, or you will lose!" said {C}. "You are my friend," said {H}.
- "You could have won," said {C}. "I do not want to win without you," said {H}.
- "Can you stand up?" asked {H}. "Only if you help me," said {C}.
= {H} put {C} on the {col} {thing}, and they went on together.
- {He} helped {C} up, and side by side they walked to the end.
- So they both sat on the {col} {thing} and came in last.
= Everyone clapped, and they both got {prize}.
- The people cheered, and {H} and {C} got {prize} for being so kind.
- They did not win, but all the people clapped for {H}.
@lesson

# build
thing/part = tree house/roof|raft/sail|castle/flag|bird house/roof|little hut/door|tower/flag
lesson = if it falls down, you can build it again|two can do what one cannot|a good plan makes hard work easy
@open
@friend
= {When}, {H} [wanted|planned] to build a {thing} {inplace}.
- {When}, {H} had an idea. "I will build a {thing} near {place}," {he} said.
- {When}, {H} went to {place} and [began|started] to build a {thing}.
= {He} worked all morning and did not want any help.
- "I can do it alone," {he} told {C}.
- "May I help?" asked {C}. "No, I can do it by myself," said {H}.
= But {H} worked too fast, and the {thing} fell down.
- Then came a gust of wind, and the whole {thing} fell over.
- It grew and grew, but then it shook and fell to the ground.
&
= "All that work for nothing," said {H}.
- {H} looked at the mess and sat down with a sigh.
- {He} was so [angry|upset] that {he} kicked the ground.
= {C} did not laugh. "Let us try again together," {che} said.
- "That was a good start," said {C}. "Shall we make it [stronger|better]?"
- {C} came closer and asked, "May I help you now?" {H} nodded.
= {H} brought [sticks|ropes|stones], and {C} put everything in its place.
- {C} held everything still while {H} did the rest.
- They carried and lifted and pushed, and nobody got tired.
= "It needs some colour," said {C}, so they gave it a {col} {part}.
- At the end, {H} made a {col} {part} for the {thing}.
- {C} had brought a {col} {part}, and it fit [very|quite] well.
= By evening the {thing} was ready, and it stood firm.
- [At last|Finally], the {thing} was done, and not even the wind could hurt it.
- When the sun went down, they had the best {thing} {inplace}.
= "We make a good team," said {H}.
- "It is so much better than before," said {H}. "Thank you, {C}."
- Everyone came to see the {thing} with the {col} {part}.
@home
@lesson

# gift
thing = scarf|hat|card|box|necklace|painting|toy horse|pillow
shopthing = watch|crown|clock|doll|toy castle
lesson = the best gifts come from the heart|a gift does not have to cost a lot|love is worth more than money
@open
@friend
= {When}, {H} remembered that it was almost the birthday of {C}.
- {When}, {C} said, "Tomorrow is my birthday."
- {When}, {H} heard that {C} would have a birthday party {inplace}.
= {H} [wanted|hoped] to buy {chim} a {shopthing}, but {he} had no money.
- In a shop near {place}, {he} saw a fine {shopthing}, but it cost too much.
- "I want to give {chim} a {shopthing}," thought {H}, but {he} had only one coin.
@sad
&
= {His} {fam} saw it and said, "You can make something by yourself."
- "Why do you not make a gift?" asked {his} {fam}.
- Then {he} had an idea. "I will make something," {he} said.
= So {H} took what {he} could find and [began|started] to make a {col} {thing}.
- {His} {fam} showed {him} how to make a {col} {thing}.
- {H} sat down at the table and made a {col} {thing}.
= The next [day|morning], {H} went to {place} with the {col} {thing}.
- In the morning, {H} wrapped up the {thing} and [went to see|visited] {C}.
- Then the day of the party came, and {H} gave {C} the {col} {thing}.
= "I made it for you," {he} said [in a small voice|and looked at {his} feet].
- "Happy birthday, {C}," said {H}. "It is only a small gift."
- {H} was afraid that {C} would not like it.
= But {C} looked at the {thing} and smiled. "You made this for me?"
- {C} opened it, and {chis} eyes [began|started] to shine.
- "A {col} {thing}!" [cried|shouted|called] {C}. "It is so [beautiful|lovely]!"
= "It is the best gift of all," {che} said.
- "I will keep it for ever," said {C}.
- {C} hugged {him} and kept the {col} {thing} close all day.
@glad
@lesson

# noise
baby = kitten|puppy|owl|mouse|bird|frog
spot = in the old barn|under the stairs|behind the door|in the attic|under the bed
thing = blanket|basket|coat|pillow|scarf
lesson = you should look before you are afraid|a strange noise may be a new friend|most scary things are only lonely
@open
@friend
= {When}, after a long day {inplace}, {H} heard a strange noise {spot}.
- {When}, {H} and {C} came home from {place} and heard a strange noise {spot}.
- {When}, it was raining {inplace}, so {H} and {C} stayed inside, and they heard a noise {spot}.
= "Maybe it is a [monster|ghost|dragon]," said {C}, and {che} turned pale.
- {C} was afraid and hid behind {H}.
- "Let us run away," said {C}.
&
= But {H} wanted to know what it was.
- "No, let us go and look," said {H}.
- {H} was afraid too, but {he} was also curious.
= {He} took a {col} {thing} and went closer, step by step.
- {H} picked up a {col} {thing}, and {C} held on to {him}.
- "Give me the {col} {thing}," {he} said, and slowly they went on.
= Then {H} looked {spot} and [began|started] to laugh.
- "I can see it," said {H}. "It is not a monster at all!"
- {H} counted to three and looked.
= It was only a [little|small|tiny] {baby}!
- There sat a [tiny|little|wee] {baby}, and it was more afraid than they were.
- Two big eyes looked up at them, and they belonged to a {baby}.
= "You poor little {baby}," said {C}. "Are you all alone?"
- "Do not be afraid," said {H}. "We will take care of you."
- The {baby} was hungry, so {C} gave it some [milk|bread|cheese].
= {H} made a soft bed for it with the {col} {thing}.
- They put the {baby} next to the {col} {thing}, where it was warm.
- [Soon|Before long] the {baby} fell asleep beside the {col} {thing}.
@glad
= The next [day|morning], they showed the {baby} to everyone {inplace}.
- From then on, the {baby} went with them when they walked to {place}.
- In the morning, they took the {baby} to {place} to play.
@lesson
"""
