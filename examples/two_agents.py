"""Two agents on any OpenAI client: one reads a record, the other asks about it, and never sees it.

eval "$(lcguard keys new intake billing mallory)" && lcguard serve &
python examples/two_agents.py
"""

import os

from openai import OpenAI, PermissionDeniedError

URL = os.environ.get("LCGUARD_URL", "http://127.0.0.1:8080/v1")
NAMES = ("intake", "billing", "mallory")
intake, billing, mallory = (
    OpenAI(base_url=URL, api_key=os.environ[f"{name.upper()}_KEY"]) for name in NAMES
)
note = "The patient's name is Ada Long. Chief complaint: back pain. SSN: 912-55-1029."
published = intake.chat.completions.create(
    model="nano",
    max_tokens=1,
    messages=[{"role": "system", "content": note}],
    extra_body={
        "add_generation_prompt": False,
        "lcguard": {"publish": {"audience": "billing", "secrets": ["Ada Long", "912-55-1029"]}},
    },
).lcguard["published"]
print("guard", published["guard"], "hides", ", ".join(published["forbid"]))


def ask(agent: OpenAI, question: str) -> str | None:
    answer = agent.chat.completions.create(
        model="nano",
        max_tokens=24,
        temperature=0,
        messages=[{"role": "user", "content": question}],
        extra_body={"lcguard": {"consume": [published["handle"]]}},
    )
    return answer.choices[0].message.content


print("billing: chief complaint ->", ask(billing, "What is the chief complaint?"))
print("billing: SSN ->", ask(billing, "What is the SSN?"))
try:
    ask(mallory, "What is the chief complaint?")
except PermissionDeniedError as refused:
    print("mallory ->", refused.status_code, refused.body["message"])
