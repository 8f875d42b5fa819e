"""The folder that a run leaves is all that a second stage, or a server, needs: weights, config and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import small_tokenizers
from fault_runs import Launcher
from flexsp.parallel import RankError, prepare_model, save_pretrained
from flexsp.train.config import parse_config
from flexsp.train.run_model import tokenizer_of
from reference import build, small_config

TEXTS = ("--data.source", "text.jsonl", "--run.save_model", "true")
FIRST = (*TEXTS, "--data.tokenizer", "bpe", "--model.config.vocab_size", "300", "--train.lr", "3e-2")


@pytest.fixture(scope="module")
def texts(folder: Path) -> Path:
    """The folder of runs, with a tokenizer, text and chats in it."""
    small_tokenizers.byte_pairs(folder / "bpe", first=True)
    rows = [{"text": " ".join(small_tokenizers.LINES[i % 4 : i % 4 + 1 + i % 3])} for i in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on the mat"}]
    (folder / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 60)
    return folder


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(600)
def test_a_second_stage_starts_from_the_folder_alone(texts, launcher: Launcher):
    """Its tokens and chats are those of the first, its config may be another, and its own folder is as whole."""
    first = launcher.run("none", *FIRST, "--run.dir", "one")
    assert first.statuses == [0, 0], first.err[-3000:]
    ours, theirs = (AutoTokenizer.from_pretrained(texts / name) for name in ("bpe", "one/model"))
    text = "the cat, héllo"
    assert theirs(text)["input_ids"] == ours(text)["input_ids"] and theirs(text)["input_ids"][0] == ours.bos_token_id
    assert theirs.chat_template == ours.chat_template and theirs.eos_token == "</s>"
    assert not list((texts / "one").glob("model.*"))

    (texts / "bpe").rename(texts / "gone")
    stage = ("--model.path", "one/model", "--model.config", "{}", "--model.config.max_position_embeddings", "512")
    second = launcher.run("none", *TEXTS, *stage, "--run.dir", "two")
    assert second.statuses == [0, 0], second.err[-3000:]
    assert losses(texts / "two")[0] < losses(texts / "one")[0] - 0.5
    chats = launcher.run(
        "none", *TEXTS, "--data.source", "chats.jsonl", "--model.path", "two/model", "--model.config", "{}",
        "--run.dir", "three",
    )  # fmt: skip
    (texts / "gone").rename(texts / "bpe")
    assert chats.statuses == [0, 0], chats.err[-3000:]
    said = json.loads((texts / "three/model/config.json").read_text())
    assert said["max_position_embeddings"] == 512
    assert AutoTokenizer.from_pretrained(texts / "three/model").chat_template == ours.chat_template


def test_a_tokenizer_that_cannot_be_saved_costs_a_warning_and_not_the_model(texts, launcher: Launcher):
    ended = launcher.run("tokenizer_cannot_be_saved", *FIRST, "--train.steps", "1")
    assert ended.statuses == [0, 0], ended.err[-3000:]
    warning = "model: saved without the tokenizer of 'bpe' (OSError: [Errno 28] No space left on device); copy it there"
    assert (ended.out + ended.err).count(warning) == 1
    saved = texts / "out-tokenizer_cannot_be_saved/model"
    assert {path.name for path in saved.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}


def test_the_tokenizer_is_the_data_s_or_the_model_s(tmp_path):
    small_tokenizers.byte_pairs(tmp_path / "bpe")
    bpe, bare = str(tmp_path / "bpe"), str(tmp_path)

    def found(tokenizer: str, path: str) -> str:
        return tokenizer_of(parse_config({"model": {"path": path}, "data": {"tokenizer": tokenizer}}))

    assert found("", bpe) == bpe and found("other", bpe) == "other"
    assert found("", bare) == "" and found("bytes", bpe) == ""


def finds_a_file_where_folders_must_be(path: str) -> None:
    model = prepare_model(build(small_config(), torch.float32))
    with pytest.raises(
        RankError, match=r"cannot be saved as .*/file/model \(rank 0: (NotADirectory|FileExists)Error: "
    ):
        save_pretrained(model, f"{path}/file/model")
    save_pretrained(model, f"{path}/model")


def test_a_folder_that_cannot_be_written_is_an_error_on_all_ranks_which_go_on(ranks, tmp_path):
    (tmp_path / "file").touch()
    ranks(2).run(finds_a_file_where_folders_must_be, str(tmp_path))
    assert (tmp_path / "model/model.safetensors").exists()
