"""Runs from the command line on text and chats, and what happens when the data is another at a resume."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import small_tokenizers
from test_train import train

CONFIG = """
[model]
config = { model_type = "llama", vocab_size = 300, hidden_size = 32, intermediate_size = 64, num_hidden_layers = 2, num_attention_heads = 4, num_key_value_heads = 2, max_position_embeddings = 1024 }
[data]
source = "text.jsonl"
tokenizer = "bpe"
max_length = 512
cache_dir = "data"
[planner]
profile_dir = "profiles"
max_tokens_per_rank = 300
[train]
steps = 3
batch_size = 8
lr = 3e-2
[checkpoint]
every = 3
[run]
dir = "out"
save_model = false
"""  # noqa: E501


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data-run")
    (folder / "config.toml").write_text(CONFIG)
    small_tokenizers.byte_pairs(folder / "bpe")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(small_tokenizers.LINES, k=draw.randrange(1, 12))) for _ in range(40)]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "text.jsonl").write_text("\n".join([*lines, '{"text": ""}', "{"]))
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> str:
    """What a run on text says."""
    done = train(folder, "--data.on_broken", "skip", world_size=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_text_trains_and_what_was_left_out_is_said(folder, trained):
    assert "data: text.jsonl: tokenizing 1 of 1 shards" in trained
    assert "data: text.jsonl: 40 documents" in trained and "1 empty ones left out" in trained
    assert "data: 1 rows left out: malformed JSON (the first: text.jsonl row 41); data.on_broken='skip'" in trained
    assert losses(folder / "out")[-1] < losses(folder / "out")[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_broken_row_is_one_line(folder):
    done = train(folder, "--run.dir", "broken", world_size=2)
    ours = [line for line in done.stderr.splitlines() if line.startswith("flexsp train:")]
    assert len(ours) == 1 and "text.jsonl row 41: malformed JSON" in ours[0], done.stderr[-3000:]
    assert "exitcode  : 2" in done.stderr and "flexsp/" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_resume_with_other_data_is_refused(folder, trained):
    flags = ("--data.on_broken", "skip", "--data.cache_dir", "elsewhere", "--data.workers", "1", "--train.steps", "3")
    before = (folder / "text.jsonl").read_text()
    (folder / "text.jsonl").write_text(before.replace("cat", "dog", 1))
    done = train(folder, *flags, world_size=2)
    ours = [line for line in done.stderr.splitlines() if line.startswith("flexsp train:")]
    assert len(ours) == 1, done.stderr[-3000:]
    assert (
        "data.source='text.jsonl' holds other tokens than those with which out/checkpoints/step-00000003 was made: "
        "text.jsonl changed; restore them, or give another run.dir"
    ) in ours[0]
    (folder / "text.jsonl").write_text(before)
    done = train(folder, *flags, world_size=2)
    assert done.returncode == 0 and "going on after step 3 of 3" in done.stdout, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_chats_train_on_the_assistants_turns(folder):
    """What users say is noise, which nobody learns; the assistant always says the same, which is learnt at once."""
    draw = random.Random(1)
    rows = []
    for _ in range(24):
        noise = "".join(draw.choices("abcdefghijklmnop", k=30))
        rows.append({"messages": [{"role": "user", "content": noise}, {"role": "assistant", "content": "the cat"}]})
    (folder / "chats.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    done = train(
        folder, "--data.source", "chats.jsonl", "--run.dir", "chats", "--train.steps", "16", "--checkpoint.every", "0",
        world_size=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(folder / "chats")[-1] < 1.0
    done = train(
        folder, "--data.source", "chats.jsonl", "--data.on_broken", "skip", "--run.dir", "few", "--train.steps", "1",
        "--checkpoint.every", "0", "--model.config.vocab_size", "200", world_size=2,
    )  # fmt: skip
    ours = [line for line in done.stderr.splitlines() if line.startswith("flexsp train:")]
    assert len(ours) == 1 and "no document is within vocab_size=200" in ours[0], done.stderr[-3000:]
