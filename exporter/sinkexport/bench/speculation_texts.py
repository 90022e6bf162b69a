"""Prompts for measuring speculation: three tasks whose answers repeat the prompt, and free text.

Each is (prompt, is_chat): a user's message for the chat template, or a text to continue as it is. Written for this,
not chosen among others by their results.
"""

from __future__ import annotations

LETTER = """Dear Anna,

thank you for your letter of last week. The workshop will take place on the ninth of May in the old town hall, \
and we expect about forty guests from six countries. Please send me the title of your talk before the end of \
April, together with a short summary of no more than two hundred words. Every speaker has thirty minutes, and \
ten are meant for questions from the audience. The projector in the large room takes an ordinary cable, \
but please bring your own adapter if your computer is new. Lunch is served at noon in the garden behind the \
hall; in case of rain we shall move to the library on the first floor. The hotel where we have booked rooms is \
five minutes away on foot, and breakfast is included in the price. If you come by train, take the exit towards \
the river and follow the signs to the market place. I am looking forward to seeing you again, and I hope that \
the weather will be as kind to us as it was two years ago.

With best wishes,
Thomas"""

LOG = "\n".join(
    f"2026-03-14 09:{minute:02d}:{second:02d} {level:<5} {source}: {message}"
    for minute, second, level, source, message in (
        (0, 3, "INFO", "gateway", "listening on port 8080"),
        (0, 9, "INFO", "store", "opened 12 segments in 418 ms"),
        (1, 44, "ERROR", "store", "segment 7 has a bad checksum: expected 5f3a91c2, found 00000000"),
        (1, 45, "INFO", "store", "segment 7 is read from the replica"),
        (2, 10, "WARN", "gateway", "client 10.0.4.17 sent a header of 9214 bytes"),
        (3, 58, "ERROR", "mailer", "cannot reach smtp.example.org:587: connection timed out after 30 s"),
        (4, 28, "INFO", "mailer", "3 messages wait in the queue"),
        (5, 2, "INFO", "gateway", "1841 requests in the last minute, 2 of them failed"),
        (6, 31, "ERROR", "gateway", "worker 3 did not answer for 60 s and was started again"),
        (6, 32, "INFO", "gateway", "worker 3 is ready"),
        (8, 15, "WARN", "store", "segment 9 is 94% full"),
        (9, 40, "ERROR", "mailer", "cannot reach smtp.example.org:587: connection timed out after 30 s"),
    )
)

RECORDS = "[\n" + "".join(
    f'  {{"id": {number}, "name": "{name}", "email": "{name.lower()}@example.com", "active": {active}, '
    f'"roles": ["{role}"], "address": {{"city": "{city}", "country": "Germany"}}}},\n'
    for number, name, active, role, city in (
        (1001, "Martin", "true", "editor", "Berlin"),
        (1002, "Sabine", "false", "viewer", "Hamburg"),
        (1003, "Jonas", "true", "admin", "Munich"),
        (1004, "Clara", "true", "viewer", "Cologne"),
        (1005, "Peter", "false", "editor", "Leipzig"),
    )
)

TASKS: dict[str, tuple[str, bool]] = {
    # A model of 135M parameters rewrites nothing when a message asks for it: the first words of its answer are given.
    "rewrite": (f"A letter to Anna:\n\n{LETTER}\n\nThe same letter to Maria:\n\nDear Maria,\n\nthank you", False),
    "log": (f"Copy the lines of this log that say ERROR, and nothing else.\n\n{LOG}", True),
    "records": (RECORDS.rstrip("\n"), False),
}

FREE: dict[str, tuple[str, bool]] = {
    "story": ("Write a story about a lighthouse keeper who finds a letter in a bottle.", True),
    "tale": ("Once upon a time, in a village between two mountains, there lived a clockmaker who", False),
}
