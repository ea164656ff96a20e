"""lm-eval's ``local-completions`` on a task of four questions that lies in a file."""

import json
import sys
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

TASK = """
task: tiny_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [", w"], max_gen_toks: 32, temperature: 0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
with tempfile.TemporaryDirectory() as folder:
    data = Path(folder) / "questions.jsonl"
    rows = [{"question": f"Question {n}:", "answer": "Hello" if n else "Bye"} for n in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (Path(folder) / "tiny_answers.yaml").write_text(TASK.format(data=data))
    result = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "tiny",
            "base_url": f"{sys.argv[1]}/completions",
            "tokenizer_backend": None,
            "tokenized_requests": False,
            "num_concurrent": 2,
            "max_retries": 1,
            "max_length": 128,
        },
        tasks=["tiny_answers"],
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
samples = result["samples"]["tiny_answers"]
print(
    json.dumps(
        {
            "score": result["results"]["tiny_answers"]["exact_match,none"],
            "answers": [sample["resps"][0][0] for sample in samples],
        }
    )
)
