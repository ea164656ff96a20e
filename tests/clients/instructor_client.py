"""instructor: a pydantic model out of an answer. The mode is given, see the test."""

import json
import sys

import instructor
from openai import OpenAI
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


mode = instructor.Mode[sys.argv[2]]
client = instructor.from_openai(OpenAI(base_url=sys.argv[1], max_retries=0), mode=mode)
person = client.chat.completions.create(
    model="tiny",
    response_model=Person,
    messages=[{"role": "user", "content": "Ada is 36 years old."}],
    max_retries=0,
)
print(json.dumps(person.model_dump()))
