"""How the command and its processes talk: a JSON object a line, a message and an answer in turn.

    {"workload": {...}, "threads": 2, "folder": "..."}  makes ready -> what is to be known first
    {"seconds": 0.4, "fewest": 3, "most": 200}          one turn    -> what it took

An error is answered as {"error": "..."} and ends the process, as the end of its stdin does.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]
Answering = Callable[[Message], Message]


def serve(make_ready: Callable[[Message], tuple[Answering, Message]]) -> None:
    """Answers until stdin ends or something fails.

    Args:
        make_ready: called with the first message; returns what answers the later ones, and the
            answer to the first.
    """
    # The answers keep their own channel: whatever a framework prints must not mix with them.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        answering: Answering | None = None
        for line in sys.stdin:
            message = json.loads(line)
            try:
                if answering is None:
                    answering, answer = make_ready(message)
                else:
                    answer = answering(message)
            except Exception as error:
                answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
                raise
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
