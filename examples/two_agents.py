"""Two agents on any OpenAI client: one reads a record, the other asks about it, and never sees it.

eval "$(lcguard keys new intake billing)" && lcguard serve &
python examples/two_agents.py
"""

import os

from openai import OpenAI

URL = os.environ.get("LCGUARD_URL", "http://127.0.0.1:8080/v1")
intake = OpenAI(base_url=URL, api_key=os.environ["INTAKE_KEY"])
billing = OpenAI(base_url=URL, api_key=os.environ["BILLING_KEY"])

NOTE = "The patient's name is Ada Long. Chief complaint: back pain. SSN: 912-55-1029."

published = intake.chat.completions.create(
    model="nano",
    max_tokens=1,
    messages=[{"role": "system", "content": NOTE}],
    extra_body={"add_generation_prompt": False, "lcguard": {"publish": {"audience": "billing"}}},
).lcguard["published"]
print("handle", published["handle"][:6], "guard", published["guard"], "hides", published["forbid"])

for field in ("chief complaint", "SSN"):
    answer = billing.chat.completions.create(
        model="nano",
        max_tokens=24,
        temperature=0,
        messages=[{"role": "user", "content": f"What is the {field}?"}],
        extra_body={"lcguard": {"consume": [published["handle"]]}},
    )
    print(field, "->", answer.choices[0].message.content)
