"""What the built-in word problems are made of: people, nouns and templates, in the notation of ``word_problems``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """A question and the lines of its answer; ``draws`` bound the numbers in them."""

    draws: str
    question: str
    steps: tuple[str, ...]


def _template(draws: str, question: str, *steps: str) -> Template:
    return Template(draws, question, steps)


# fmt: off
WOMEN = (
    "Amara", "Beatriz", "Chloe", "Dina", "Elena", "Fatima", "Grace", "Hana", "Ingrid", "Julia",
    "Kavya", "Leila", "Maya", "Nora", "Olga", "Priya", "Rosa", "Sofia", "Tara", "Yuki",
)
MEN = (
    "Ahmed", "Ben", "Carlos", "Daniel", "Emeka", "Felix", "George", "Hugo", "Ivan", "Jamal",
    "Kenji", "Liam", "Marco", "Noah", "Omar", "Pavel", "Rafael", "Samir", "Tom", "Victor",
)
# fmt: on

# Nouns as singular/plural: {fruit} gives the plural, {fruit.one} the singular of the same draw.
WORDS: dict[str, tuple[str, ...]] = {
    "fruit": ("apple/apples", "peach/peaches", "lemon/lemons", "plum/plums", "pear/pears", "mango/mangoes"),
    "toy": ("marble/marbles", "sticker/stickers", "toy car/toy cars", "trading card/trading cards", "shell/shells"),
    "cheap": (
        "notebook/notebooks",
        "marker/markers",
        "sandwich/sandwiches",
        "pair of socks/pairs of socks",
        "mug/mugs",
    ),
    "dear": ("jacket/jackets", "backpack/backpacks", "lamp/lamps", "chair/chairs", "helmet/helmets"),
    "baked": ("muffin/muffins", "cookie/cookies", "bread roll/bread rolls", "cupcake/cupcakes", "scone/scones"),
    "plant": ("tulip/tulips", "rose bush/rose bushes", "tomato plant/tomato plants", "young tree/young trees"),
    "container": ("box/boxes", "bag/bags", "basket/baskets", "crate/crates"),
    "animal": ("cow/cows", "goat/goats", "sheep/sheep", "horse/horses"),
    "pet": ("cat/cats", "dog/dogs", "rabbit/rabbits", "hamster/hamsters"),
    "job": ("babysitting", "mowing lawns", "tutoring", "painting fences"),
    "vehicle": ("bus/buses", "train/trains", "truck/trucks", "van/vans"),
    "place": ("library/libraries", "school/schools", "museum/museums", "theater/theaters"),
    "maker": ("factory/factories", "workshop/workshops"),
    "product": ("bicycle/bicycles", "clock/clocks", "radio/radios", "table/tables"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "month": ("January", "March", "April", "June", "August", "October", "December"),
    "sport": ("basketball", "handball", "water polo"),
    "drink": ("lemonade", "orange juice", "iced tea", "apple cider"),
    "parent": ("mother", "father", "aunt", "uncle"),
    "relative": ("sister", "brother", "cousin", "aunt", "grandmother"),
}

TRAIN = (
    _template(
        "start 12..90; given 3..40",
        "{person} (has|owns|collected) {start} {toy}. {they} (gives|hands) {given} of them to {friend}. How many "
        "{toy} (are left|does {person} have left)?",
        "(|Now ){person} has [left = start - given] {toy} left.",
    ),
    _template(
        "count 3..12; price 2..9; paid 20..100/10",
        "{person} (buys|picks up|pays for) {count} {cheap} that cost ${price} each. (|At the counter, ){they} hands "
        "over ${paid}. How much change does {they} get back?",
        "The {cheap} cost [$cost = count * price](| in all| together).",
        "(|So ){person} gets [$change = paid - cost] back.",
    ),
    _template(
        "wage 8..25; hours 2..8; days 3..6",
        "{person} earns ${wage} an hour (for|from) {job}. {they} works {hours} hours a day(| and does so) for {days} "
        "days. How much (money |)does {they} earn (in all|altogether|in total)?",
        "{person} works [time = hours * days] hours.",
        "(|So ){they} earns [$pay = wage * time].",
    ),
    _template(
        "age 8..12; times 3..4; years 2..12",
        "{person} is {age} years old. {their} {parent} is {times} times as old(| as {person}). How old will {their} "
        "{parent} be in {years} years?",
        "{person}'s {parent} is [now = age * times] years old (now|today).",
        "In {years} years, {their} {parent} will be [later = now + years] years old.",
    ),
    _template(
        "total 12..96; share 2..6",
        "{person} (baked|made) {total} {baked}. {they} sold 1/{share#} of them (in the morning|before noon)(| and "
        "kept the rest). How many {baked} (remained|were left)?",
        "{person} sold [gone = total / share] {baked}.",
        "(|So |That means ){they} had [left = total - gone] {baked} left.",
    ),
    _template(
        "price 20..90/5; percent 10..50/5",
        "A {dear.one} (usually|normally) costs ${price}. (Today|This week) it is sold (at a discount of "
        "{percent#}%|for {percent#}% less). How much does {person} pay for (it|the {dear.one})?",
        "The discount is [$off = price * percent / 100].",
        "(|So ){person} pays [$final = price - off].",
    ),
    _template(
        "rows 4..15; each 5..20; dead 3..25",
        "{person} plants {rows} rows of {plant} with {each} {plant} in (each|every) row. {dead} of them (die|dry "
        "out) (during|in) the summer. How many {plant} are (still alive|left)?",
        "{person} planted [all = rows * each] {plant}.",
        "After the summer, [left = all - dead] {plant} are left.",
    ),
    _template(
        "speed 40..70/5; hours 2..6; rest 20..200/10",
        "A {vehicle.one} (drives|travels) at {speed} miles per hour for {hours} hours. (It then covers|After that it "
        "goes) another {rest} miles. How (far|many miles) does it (go|travel) in all?",
        "In {hours} hours, the {vehicle.one} (goes|covers) [first = speed * hours] miles.",
        "(|So )it travels [all = first + rest] miles in all.",
    ),
    _template(
        "first 6..40; more 4..30; sharers 3..8",
        "{person} picked {first} {fruit} and {friend} picked {more} more than {person}. They (share|split) all the "
        "{fruit} (equally|evenly) among {sharers} (people|neighbors|families). How many {fruit} does each (of them "
        "|)get?",
        "{friend} picked [second = first + more] {fruit}.",
        "(Together|In all), they have [all = first + second] {fruit}.",
        "Each (one |)gets [each = all / sharers] {fruit}.",
    ),
    _template(
        "boxes 3..15; each 6..24; sold 10..150",
        "A (store|shop) receives {boxes} {container} with {each} {fruit} in each. By (noon|evening), {sold} {fruit} "
        "have been sold. How many {fruit} (remain|are left|does the shop still have)?",
        "The {container} hold [all = boxes * each] {fruit}.",
        "There are [left = all - sold] {fruit} left.",
    ),
    _template(
        "goal 60..300/10; weekly 5..30/5; gift 10..60/5",
        "{person} (wants|is saving money) to buy a {product.one} that costs ${goal}. {their} {relative} gives {them} "
        "${gift}, and {they} can save ${weekly} (a|each|every) week. How many weeks (does {they} need|will it take "
        "{them}) to have enough?",
        "{person} still needs [$need = goal - gift].",
        "(|So )it takes [weeks = need / weekly] weeks.",
    ),
    _template(
        "pages 80..400/10; read 20..150/5; daily 5..40/5",
        "{person} is reading a book of {pages} pages. {they} has (already |)read {read} pages. (From now on|If from "
        "today) {they} reads {daily} pages a day, how many days will it take {them} to finish (it|the book)?",
        "There are [left = pages - read] pages left( to read|).",
        "(|So )it will take {them} [days = left / daily] days.",
    ),
    _template(
        "adults 2..8; children 2..9; full 8..20/2",
        "A ticket for the (zoo|circus|fair) costs ${full} for adults and half (as much|of that) for children. How "
        "much do {adults} adults and {children} children pay(| together| in total)?",
        "A child's ticket costs [$half = full / 2].",
        "The adults pay [$grown = adults * full].",
        "The children pay [$small = children * half].",
        "(Together|In total), they pay [$all = grown + small].",
    ),
    _template(
        "small 8..30; times 2..5; fewer 3..20",
        "{person} has {small} {toy}. {friend} has {times} times as many(| {toy} as {person}), and {other} has "
        "{fewer} fewer than {friend}. How many {toy} do (the three|all three|they) have (together|altogether)?",
        "{friend} has [second = small * times] {toy}.",
        "{other} has [last = second - fewer] {toy}.",
        "(Together|Altogether|In all), they have [all = small + second + last] {toy}.",
    ),
    _template(
        "minutes 10..45/5; days 3..7; weeks 2..6",
        "{person} practices the (piano|violin|guitar|flute) for {minutes} minutes a day, {days} days a week. How "
        "many minutes does {they} practice in {weeks} weeks?",
        "{they} practices [weekly = minutes * days] minutes (a|each) week.",
        "In {weeks} weeks, that (is|makes) [all = weekly * weeks] minutes.",
    ),
    _template(
        "students 20..200/10; percent 10..90/10",
        "There are {students} (students|children|pupils) in a (chess|drama|science|dance) club. {percent#}% of them "
        "(walk|come on foot)(|, and the others take the {vehicle.one}). How many (do not walk|come another way)?",
        "[walk = students * percent / 100] of them walk.",
        "(|So )[rest = students - walk] do not.",
    ),
    _template(
        "cows 10..60; bought 5..30; sold 4..40",
        "{person}, a farmer, (has|keeps) {cows} {animal}. (In spring|First), {they} buys {bought} more. (In "
        "fall|Later), {they} sells {sold} (of them|{animal}). How many {animal} does {person} have (then|in the "
        "end)?",
        "(With|After) the new ones, {person} has [more = cows + bought] {animal}.",
        "After the sale, there are [left = more - sold] {animal}.",
    ),
    _template(
        "pets 2..6; cups 2..5; weeks 2..5",
        "{person} has {pets} {pet}. Each {pet.one} eats {cups} cups of food a day. How many cups (of food |)do "
        "(they|the {pet}) eat in {weeks} weeks?",
        "The {pet} eat [daily = pets * cups] cups a day.",
        "{weeks#} weeks have [days = weeks * 7] days.",
        "(|So )they eat [all = daily * days] cups.",
    ),
    _template(
        "made 20..120/10; cost 2..6; price 7..15",
        "A {maker.one} makes {made} {cheap} a day. Each costs ${cost} to make and is sold for ${price}. (How "
        "much|What) is the profit (of|on) one day(| if all are sold)?",
        "The profit on (each|one) is [$gain = price - cost].",
        "(|So )the profit of one day is [$profit = made * gain].",
    ),
    _template(
        "one 2..9; two 2..6; three 2..8; points 20..60",
        "In a {sport} game, {person} scores {one} times for {two} points and {friend} scores {three} times for {two} "
        "points. The (whole |)team has {points} points. How many points did the (other players|others) score?",
        "{person} scores [first = one * two] points.",
        "{friend} scores [second = three * two] points.",
        "The others score [rest = points - first - second] points.",
    ),
    _template(
        "liters 6..40; glass 2..6; guests 3..12",
        "{person} (makes|prepares) {liters} liters of {drink} for a party. One liter fills {glass} glasses. If "
        "{guests} (guests|friends) drink the same amount and nothing is left over, how many glasses does each (of "
        "them |)drink?",
        "The {drink} fills [all = liters * glass] glasses.",
        "Each (of the {guests} |)drinks [each = all / guests] glasses.",
    ),
    _template(
        "floors 3..12; rooms 4..15; windows 2..6",
        "A (hotel|building|{place.one}) has {floors} floors with {rooms} rooms on each floor. Every room has "
        "{windows} windows. How many windows (are there|does it have)(| in all)?",
        "There are [all = floors * rooms] rooms.",
        "(|So )there are [glass = all * windows] windows.",
    ),
    _template(
        "first 40..120/10; second 30..90/10; cost 2..5; trips 2..8",
        "{person} drives {first} miles on {day} and {second} miles on the next day. {their} car uses a gallon of gas "
        "every 10 miles, and a gallon costs ${cost}. How much does {they} spend on gas?",
        "{person} drives [miles = first + second] miles.",
        "{their} car uses [gallons = miles / 10] gallons.",
        "(|So )the gas costs [$spent = gallons * cost].",
    ),
    _template(
        "rent 30..90/5; share 2..5; food 8..30",
        "{person} and {their} friends, {share} people in all, (rent|hire) a boat for ${rent} and (split|share) the "
        "cost (equally|evenly). {person} also (spends|pays) ${food} for lunch. How much does {they} spend (in "
        "all|altogether)?",
        "{their} share of the boat is [$part = rent / share].",
        "(|With lunch, |So )(that makes|{they} spends) [$all = part + food].",
    ),
    _template(
        "width 4..20; length 6..30; price 3..12",
        "A (rectangular |)(garden|field|yard) is {length} feet long and {width} feet wide. A fence costs ${price} a "
        "foot. How much does (it cost|{person} pay) to put a fence all (the way |)around it?",
        "(One|A) long side and (one|a) short side make [half = length + width] feet.",
        "All around, that is [around = half * 2] feet.",
        "(|So )the fence costs [$all = around * price].",
    ),
    _template(
        "morning 10..50; times 2..4; price 2..6",
        "On {day}, {person} sells {morning} {baked} in the morning and {times} times as many in the afternoon. Each "
        "(of them |)costs ${price}. How much money does {they} (make|take in) (that day|on {day})?",
        "In the afternoon, {person} sells [later = morning * times] {baked}.",
        "(In all|That day), {they} sells [all = morning + later] {baked}.",
        "(|So ){they} (makes|takes in) [$money = all * price].",
    ),
    _template(
        "friends 3..9; each 3..12; kept 4..20",
        "{person} gave each of {their} {friends} friends {each} {toy} and kept {kept} for (a rainy day|later). How "
        "many {toy} did {they} have (at first|in the beginning|to start with)?",
        "{person} gave away [gone = friends * each] {toy}.",
        "(|So )at first {they} had [start = gone + kept] {toy}.",
    ),
    _template(
        "sum 20..90; gap 4..30/2",
        "{person} and {friend} have {sum} {toy} (together|between them). {person} has {gap} more than {friend}. How "
        "many {toy} does {friend} have?",
        "Without the {gap} extra ones, there would be [equal = sum - gap] {toy}.",
        "(|So ){friend} has [less = equal / 2] {toy}.",
    ),
    _template(
        "hour 20..90/10; minutes 10..50/10; hours 2..6",
        "A machine (prints|makes) {hour} (pages|labels|cards) every {minutes} minutes. How many (does it make|are "
        "ready) in {hours} hours?",
        "{hours#} hours are [time = hours * 60] minutes.",
        "The machine (runs through|fits in) [rounds = time / minutes] rounds(| in that time).",
        "(|So )it makes [all = hour * rounds].",
    ),
    _template(
        "base 20..80/5; extra 3..12; over 3..20; months 2..6",
        "{person} pays ${base} a month for {their} phone and ${extra} for every gigabyte above the limit. (Last "
        "month|In {month}) {they} was {over} gigabytes above (it|the limit). How much did {they} have to pay?",
        "The extra gigabytes cost [$more = extra * over].",
        "(|So ){person} had to pay [$all = base + more].",
    ),
    _template(
        "full 24..120/4; part 2..4; next 3..6",
        "A (tank|barrel) holds {full} gallons of water. On {day}, 1/{part#} of it is used, and on the next day "
        "1/{next#} of what is left. How many gallons (remain|are left|does it hold then)?",
        "On the first day, [used = full / part] gallons are used.",
        "That leaves [rest = full - used] gallons.",
        "On the second day, [again = rest / next] gallons are used.",
        "(|So )[left = rest - again] gallons are left.",
    ),
    _template(
        "first 60..99; second 60..99; third 60..99",
        "{person} (scored|got) {first}, {second} and {third} points (on|in) three (math |spelling |science |)tests. "
        "What is {their} average(| score)?",
        "{their} points add up to [sum = first + second + third].",
        "(|So )the average is [mean = sum / 3].",
    ),
)

HELD_OUT = (
    _template(
        "big 20..80; small 5..30; groups 3..9",
        "{person} has {big} {fruit} and {small} of them are (rotten|bad). {they} (packs|puts) the good ones into "
        "{container} of {groups}. How many {container} does {they} (fill|need)?",
        "[good = big - small] {fruit} are good.",
        "(|So ){person} fills [packs = good / groups] {container}.",
    ),
    _template(
        "price 4..15; count 2..8; coupon 3..15",
        "{person} (orders|buys) {count} {cheap} for ${price} each and (uses|has) a coupon that takes ${coupon} off "
        "the (whole bill|total). How much does {they} pay?",
        "(Without|Before) the coupon, {they} would pay [$full = count * price].",
        "(|So |With it, ){person} pays [$less = full - coupon].",
    ),
    _template(
        "old 34..60; ago 3..12; share 3..5",
        "{person}'s {parent} is {old} years old. {ago} years ago, {person} was 1/{share#} as old as {their} {parent} "
        "(was then|at that time). How old is {person} (now|today)?",
        "{ago} years ago, {their} {parent} was [then = old - ago] years old.",
        "{person} was [young = then / share] years old.",
        "(|So )today {person} is [now = young + ago] years old.",
    ),
    _template(
        "wage 10..24/2; hours 5..8; late 2..5",
        "{person} gets ${wage} an hour (for|from) {job}. On {day}, {they} works {hours} hours, and then {late} more "
        "hours for which {they} is paid double. How much does {they} earn (on {day}|that day)?",
        "The first hours (pay|bring) [$plain = wage * hours].",
        "(Double pay|The double rate) is [$rate = wage * 2] an hour.",
        "The extra hours (pay|bring) [$extra = rate * late].",
        "(|So |In all, ){they} earns [$all = plain + extra].",
    ),
    _template(
        "people 40..300/20; percent 10..50/10; new 5..60/5",
        "{people} people are members of a (choir|chess club|swim team|gym). This year their number grows by "
        "{percent#}%, and then {new} of them leave. How many members are there (now|in the end)?",
        "[join = people * percent / 100] people join.",
        "That makes [more = people + join] members.",
        "(|So |In the end, )there are [final = more - new] members.",
    ),
    _template(
        "one 3..12; two 3..12; hours 2..7",
        "{person} walks {one} miles (a|every) day and {friend} walks {two} miles (a|every) day. How many miles do "
        "they walk together in {hours} days?",
        "Together, they walk [daily = one + two] miles a day.",
        "(|So )in {hours} days they walk [all = daily * hours] miles.",
    ),
    _template(
        "trays 3..9; each 6..24/2; share 2..4",
        "{person} takes {trays} trays of {each} {baked} out of the oven. 1/{share#} of all the {baked} (are "
        "burnt|are too dark). How many {baked} can {they} (still |)(sell|serve)?",
        "There are [all = trays * each] {baked}.",
        "[bad = all / share] of them are burnt.",
        "(|So ){person} can (sell|serve) [good = all - bad] {baked}.",
    ),
    _template(
        "distance 60..360/20; speed 30..60/10; back 2..9",
        "A {vehicle.one} needs to go {distance} miles at {speed} miles per hour. After that the driver rests for "
        "{back} hours. How many hours (pass|go by) in all?",
        "The drive takes [drive = distance / speed] hours.",
        "(|So |With the rest, )[all = drive + back] hours pass.",
    ),
    _template(
        "shelves 3..10; each 8..30; out 5..60; back 3..40",
        "A (library|bookstore) has {shelves} shelves with {each} books on each shelf. On {day}, {out} books are "
        "taken (away|out) and {back} are brought back. How many books are there (now|then)?",
        "The shelves hold [all = shelves * each] books.",
        "Without the ones taken, [fewer = all - out] books are there.",
        "(|So |Then )there are [final = fewer + back] books.",
    ),
    _template(
        "cost 12..60/4; share 2..5; price 20..90/5",
        "{person} buys a {dear.one} for ${price} and a {product.one} that costs {share} times as much. {they} pays "
        "${cost} at once and the rest later. How much does {they} pay later?",
        "The {product.one} costs [$second = price * share].",
        "Together, they cost [$all = price + second].",
        "(|So |Later, ){person} pays [$rest = all - cost].",
    ),
)
