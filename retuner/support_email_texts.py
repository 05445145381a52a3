"""The words of the sample e-mails. `support_emails` puts them together and says what each label means.

In every text `[a|b]` is a choice, {p} the product, {q} another one, {o} the order number, {n} the writer. A text
below `PROBLEMS` or `PRIORITIES` must leave no doubt about its label, and no other text may hint at one.
"""

KEYS = ("product", "category", "priority", "order_number", "name")


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split("|"))


INSTRUCTIONS = (
    "Turn this e-mail into JSON:",
    "Support e-mail to JSON, please:",
    "Give product, category, priority, order_number and name as JSON.",
    "Fill in product, category, priority, order_number, name:",
    "E-mail to JSON:",
)
SYSTEMS = (
    "You turn support e-mails into JSON: product, category, priority, order_number, name.",
    "Answer every e-mail with one line of JSON.",
    "You read a shop's mail and reply in JSON only.",
    "Extract product, category, priority, order_number, name as JSON; null if unknown.",
)

PRODUCTS = _listed(
    "kettle|desk lamp|rain jacket|bookshelf|yoga mat|toaster|backpack|office chair|garden hose|"
    "blender|coffee grinder|wall clock|phone case|tent|pillow|bike helmet|frying pan|space heater|"
    "water bottle|rug|headset|router|keyboard|suitcase|umbrella|scooter|hair dryer|printer|"
    "ceiling fan|mirror|drill|vacuum cleaner|sleeping bag|monitor|bread knife|camping stove|"
    "standing desk|electric shaver|picture frame|tea set|fish tank|dog bed|bird feeder|kitchen scale|"
    "rice cooker|alarm clock|air pump|step ladder|wool blanket|cutting board|speaker|camera bag|"
    "shower head|night light|lawn mower|oven glove|juicer|bath mat|coat rack|guitar stand"
)

FIRST_NAMES = _listed(
    "Marta|Tobias|Ines|Kwame|Priya|Jonas|Leila|Anders|Chloe|Dmitri|Fatima|Hugo|Yuki|Samuel|Nadia|"
    "Pedro|Greta|Omar|Bianca|Elias|Rosa|Victor|Mei|Callum|Aisha|Bruno|Freya|Ivan|Lucia|Noor|Oscar|"
    "Paula|Ravi|Sofia|Tom|Ursula|Wanda|Xavier|Zoe|Grace|Henrik|Amara|Felix|Dalia|Mina|Theo|Carmen|"
    "Ken|Olga|Ruth"
)
LAST_NAMES = _listed(
    "Lind|Okafor|Novak|Reyes|Tanaka|Murphy|Haddad|Berg|Costa|Singh|Weber|Dubois|Rossi|Larsen|Popov|"
    "Kaya|Mensah|Quinn|Silva|Fischer|Moreno|Patel|Sato|Walsh|Eriksen|Bauer|Nowak|Castro|Blake|Hughes|"
    "Ivanov|Petit|Romano|Vega|Young|Adler|Brandt|Cruz|Doyle|Egan|Frost|Gray|Holm|Jansen|Keller|Lopez"
)

PROBLEMS = {
    "billing": (
        "I was charged [twice|two times] for [my|the] {p}.",
        "My [card|bank] statement shows [two payments|too high an amount] for the {p}.",
        "The [discount|voucher] was not [applied|taken off] when I bought the {p}.",
        "The invoice for [my|the] {p} [is wrong|has a mistake in it|shows the wrong total].",
        "You [billed|charged] me for three, but I only bought one {p}.",
        "I paid [shipping|a fee] for the {p} [although it should be free|that nobody told me about].",
        "The {p} cost me [more than the price on your site|twice what I expected].",
        "There is a second payment on my account for the same {p}.",
        "Your receipt says more for the {p} than the page did.",
        "I used a gift card for the {p} and still my bank account was debited.",
    ),
    "wrong_item": (
        "I ordered a {p} but [got|received|was sent] a {q}[| instead].",
        "Instead of the {p} [there was|I found] a {q} in the box.",
        "You sent the {p} in the wrong [size|colour].",
        "The {p} is [red|green|black], but I ordered [blue|white|yellow].",
        "A {q} came today. I had [ordered|paid for] a {p}.",
        "This is not the {p} I [chose|picked], it is [another|a different] model.",
        "[Wrong parcel|Mix-up]: [expected|wanted] a {p}, [opened the box to|got] a {q}.",
        "The label says {p}, but inside is a {q}.",
        "I picked the [large|small] {p} and was sent the [other size|wrong one].",
        "Somebody packed a {q} for me, although I had asked for a {p}.",
    ),
    "damaged": (
        "[My|The] {p} arrived [broken|cracked|in pieces|badly scratched].",
        "[My|The] {p} [stopped working|broke] after [two days|one use|a week].",
        "The {p} came with a [crack|hole|big dent] in it.",
        "The {p} fell apart [the first time I used it|on day one].",
        "[A part|One piece] of [my|the] {p} [came off|was already broken].",
        "The box was crushed and the {p} [inside is bent|is ruined].",
        "{p} [defective|faulty], [straight out of the box|does not work at all].",
        "The {p} has a [crack|tear] all along one side.",
        "I [barely|hardly] used the {p} and it is already broken.",
        "When I unpacked the {p} it was already [in two halves|falling apart], and the box was fine.",
    ),
    "delivery": (
        "[My|The] {p} [still has not arrived|never turned up|has not reached me].",
        "Where is the {p} I [ordered|bought] [two|three] weeks ago?",
        "Tracking [says|claims] the {p} was delivered, but nothing came.",
        "I [am still|have been] waiting for [my|the] {p}[| since last month].",
        "The {p} was due [on Monday|a week ago] and [nothing has come|there is no sign of it].",
        "The parcel with [my|the] {p} [seems to be lost|is stuck at the depot|has not moved for days].",
        "{p} [not here yet|still missing], [courier|driver] never came.",
        "According to your mail the {p} left the warehouse in [March|May], and I have heard nothing since.",
        "I stayed at home all day for the {p} and nobody rang.",
        "My neighbours have not seen the parcel either, so where is [my|the] {p}?",
    ),
    "return": (
        "I [no longer need|do not need] the {p} and [would like|want] to send it back.",
        "I changed my mind about the {p}[, it is still sealed|]. [How|Where] do I return it?",
        "The {p} [is fine|works well] but it [does not suit|is too big for] our flat, so it goes back.",
        "[Can|May] I [return|bring back] the {p}? It is [unused|still in its box].",
        "We [already have|were given] a second {p}, so this one can go back to you.",
        "I would like to return the {p}, nothing wrong with it, I [just|simply] do not [like|want] it.",
        "My partner had bought the same {p} and we do not need two. How can I give one back?",
        "I will not keep the {p}, though there is no fault with it.",
        "Buying the {p} was a bad idea of mine. Can it come back to you?",
    ),
    "question": (
        "Does the {p} come with a [warranty|manual]?",
        "[How do I|What is the best way to] [clean|store] the {p}?",
        "Is the {p} [also sold|available] in [grey|another colour]?",
        "How [heavy|wide|tall] is the {p}?",
        "Can the {p} [be used|stay] outdoors?",
        "Quick question about the {p}: [where is it made|what is it made of|how big is the box]?",
        "I am thinking of buying a {p}. [Do you ship to Malta|Is it in stock]?",
        "Before I buy: is the {p} easy to [clean|put together]?",
        "Will the {p} fit on a small [shelf|table]?",
        "Could you tell me [who makes the {p}|how old the design of the {p} is]?",
    ),
}
PRIORITIES = {
    "high": (
        "[This is|It is|Very] urgent[.|!]",
        "[Urgent|URGENT][.|!]",
        "I need [this solved|an answer|it sorted] urgently.",
        "Please answer [today|at once], it is urgent.",
    ),
    "low": (
        "[No hurry|There is no hurry][| at all].",
        "I am in no hurry[| with this].",
        "No hurry, [answer when you have time|it can wait|next month is fine].",
    ),
    "normal": ("",),
}
ORDER_MENTIONS = (
    "[Order|My order is|The order number is|Order no.] {o}.",
    "[It is|This is about|I mean] order [{o}|#{o}].",
    "[Reference|Ref.|Order number:] {o}.",
    "(order [{o}|#{o}])",
)
ORDER_SUBJECTS = ("Subject: [order|my order] {o}", "Subject: {o}")
SUBJECTS = ("Subject: [help|problem|hello|your shop]", "Subject: [my|the|about the] {p}")
SMALL_TALK = (
    "I have been a customer for years.",
    "I [usually|normally] like your shop.",
    "I am [very|rather|quite] [disappointed|annoyed].",
    "[Sorry|Apologies] for the short note.",
    "I [hope|trust] you are well.",
    "This is my [second|third] e-mail.",
    "My [husband|sister|flatmate] [said|thinks] I should write.",
    "[Your colleague|The person on the phone] could not help me.",
    "[I live|We are] in [Leeds|Porto|Ghent], by the way.",
    "Greetings from [rainy|sunny] [Leeds|Porto|Ghent].",
    "I have written [before|twice] and got no reply.",
    "What a week.",
)
BUYER_TALK = (
    "It [is|was] [meant as|to be] a [gift|present] for my [mother|son|neighbour].",
    "I paid in euros[|, by card].",
    "I bought it in [May|June|October].",
    "[Honestly|Really], [what a mess|this is no way to treat people].",
    "The rest of my order was [perfect|fine].",
    "I [must say I|had] expected better.",
)
GREETINGS = ("[Hi,|Hello,|Hello there,|Dear team,|Good morning,|Hey,|Hi support,|Dear shop,|]",)
NAMED_ENDINGS = ("[Thanks, |- |Best, |Yours, |Cheers |]{n}", "[Regards,|Kind regards|Thank you]\n{n}")
NAMED_OPENINGS = ("[This is|It is|I am|My name is] {n}.", "{n} here.")
PLAIN_ENDINGS = ("[Thanks|Thank you.|Regards|Best wishes|Sent from my phone]", "")
UNNAMED_ENDINGS = ("[Thanks.|Regards,|]\n(no name given)", "(no name)")
NO_ORDER_NUMBER = (
    "I have no order number.",
    "[I lost|I cannot find] the order number.",
    "[There is no|No] order number[ yet|].",
)

FOLLOW_UPS = {
    "product": (
        "[Sorry|Correction], [I mean|it is about] the {p}.",
        "I wrote the wrong thing, it is the {p}.",
    ),
    "order_number": (
        "[Sorry|Correction|Oops], the order number is {o}.",
        "Wrong number, I meant order {o}.",
    ),
    "priority": (
        "[By the way|Update]: it is urgent now.",
        "It has become urgent!",
    ),
    "name": ("[I forgot to sign|My name is missing]: {n}.", "PS: the name is {n}."),
}
CHAT_WORDS = {"please": "pls", "thanks": "thx", "you": "u", "because": "cos", "are": "r", "your": "ur"}
