"""Pretrains the embedded world's two models from scratch: the stand-ins for the checkpoints that a lab downloads.

First the vision tower alone, as a classifier of every patch; then, with the tower frozen, the rest of the model on
captions and questions about training scenes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from experiments import checks
from experiments.errors import TrainingError
from experiments.models.adapter import IGNORED, Batch, append_answers
from experiments.worlds import tiny_models
from experiments.worlds.pool import ScenePool, scene_pool, turn, turns, vocabulary
from experiments.worlds.scenes import COLOURS, generator


@dataclass(frozen=True)
class Phase:
    """One optimisation of pretraining: AdamW with a cosine schedule after a warm-up of 5 % of the steps."""

    steps: int
    batch: int
    learning_rate: float

    def __post_init__(self) -> None:
        checks.whole(self, "steps", "batch")
        checks.real(self, "learning_rate", above=True)


@dataclass(frozen=True)
class DigitsLlava:
    """The embedded world's LLaVA: vision tower, then projector and language model on packed questions."""

    scenes: int
    seed: int
    vision: Phase
    language: Phase

    def __post_init__(self) -> None:
        checks.whole(self, "scenes")
        checks.whole(self, "seed", least=0)

    def build(self, out: Path) -> None:
        """Trains from scratch and writes a checkpoint folder. Raises TrainingError if a loss is not finite."""
        torch.manual_seed(self.seed)
        model, processor = tiny_models.llava(vocabulary())
        pool = scene_pool(processor.image_processor, self.scenes)
        tower = model.model.vision_tower

        def patches(pixels: Tensor) -> Tensor:  # of the layer that LLaVA reads, without the class token
            return tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]

        train_tower(tower, patches, pool, self.vision, self.seed)
        tower.requires_grad_(False)

        def batch_loss(indices: np.ndarray, rng: np.random.Generator) -> Tensor:
            batch = pack_batch(processor.tokenizer, [turns(pool.scenes[index], rng) for index in indices])
            return model(**batch, pixel_values=pool.pixels[indices]).loss

        optimise("language", trainable(model), batch_loss, len(pool), self.language, self.seed)
        save(model, processor, out)


@dataclass(frozen=True)
class DigitsInstructBlip:
    """The embedded world's InstructBLIP: vision tower, alignment of the queries, then all but the tower.

    ``street_captions`` of its captions, a share, are in the style of the caption target. Fine-tuning leaves the
    language model frozen, so it can only be led to a style that it has met, as Vicuna has met every kind of English.
    """

    scenes: int
    seed: int
    street_captions: float
    vision: Phase
    align: Phase
    language: Phase

    def __post_init__(self) -> None:
        checks.whole(self, "scenes")
        checks.whole(self, "seed", least=0)
        checks.real(self, "street_captions", most=1.0)

    def build(self, out: Path) -> None:
        """Trains from scratch and writes a checkpoint folder. Raises TrainingError if a loss is not finite."""
        torch.manual_seed(self.seed)
        model, processor = tiny_models.instructblip(vocabulary())
        pool = scene_pool(processor.image_processor, self.scenes)
        tower = model.vision_model
        train_tower(tower, lambda pixels: tower(pixels).last_hidden_state[:, 1:], pool, self.vision, self.seed)
        tower.requires_grad_(False)
        with torch.no_grad():
            features = torch.cat([tower(part).last_hidden_state for part in pool.pixels.split(256)])
        align_queries(model, processor, features, pool, self.align, self.seed)
        slots = [model.config.image_token_index] * tiny_models.QUERY_TOKENS

        def batch_loss(indices: np.ndarray, rng: np.random.Generator) -> Tensor:
            asked = [turn(pool.scenes[index], rng, self.street_captions) for index in indices]
            prompts = [[*slots, *processor.tokenizer(prompt)["input_ids"]] for prompt, _ in asked]
            batch = append_answers(prompts, [answer for _, answer in asked], processor.tokenizer)
            states = query_states(model, processor, features[indices], [prompt for prompt, _ in asked])
            ids = batch.pop("input_ids")
            is_slot = (ids == model.config.image_token_index)[..., None]
            embeddings = model.get_input_embeddings()(ids).masked_scatter(is_slot, model.language_projection(states))
            return model.language_model(inputs_embeds=embeddings, **batch).loss

        optimise("language", trainable(model), batch_loss, len(pool), self.language, self.seed)
        save(model, processor, out)


def query_states(model: Any, processor: Any, features: Tensor, prompts: list[str]) -> Tensor:
    """The Q-Former's queries after reading patches and prompts: (batch, queries, width)."""
    text = processor.qformer_tokenizer(prompts, padding=True, return_tensors="pt")
    queries = model.query_tokens.expand(len(features), -1, -1)
    mask = torch.cat([torch.ones(queries.shape[:2], dtype=torch.long), text["attention_mask"]], dim=1)
    states = model.qformer(
        input_ids=text["input_ids"], attention_mask=mask, query_embeds=queries, encoder_hidden_states=features
    ).last_hidden_state
    return states[:, : queries.shape[1]]


def align_queries(model: Any, processor: Any, features: Tensor, pool: ScenePool, phase: Phase, seed: int) -> None:
    """Teaches the first four query tokens to name the digit and the colour of one cell each."""
    width = model.config.qformer_config.hidden_size
    digit_head, colour_head = nn.Linear(width, 11), nn.Linear(width, len(COLOURS) + 1)

    def batch_loss(indices: np.ndarray, rng: np.random.Generator) -> Tensor:
        prompts = [turn(pool.scenes[index], rng)[0] for index in indices]
        states = query_states(model, processor, features[indices], prompts)[:, :4]
        digit_loss = class_loss(digit_head(states), pool.digits[indices])
        return digit_loss + class_loss(colour_head(states), pool.colours[indices])

    parameters = [*model.qformer.parameters(), *digit_head.parameters(), *colour_head.parameters(), model.query_tokens]
    optimise("align", parameters, batch_loss, len(pool), phase, seed)


def train_tower(
    tower: nn.Module, features: Callable[[Tensor], Tensor], pool: ScenePool, phase: Phase, seed: int
) -> None:
    """Trains ``tower`` to tell from every patch its cell's digit and colour, and its own place."""
    side = tiny_models.IMAGE_SIZE // tiny_models.PATCH_SIZE
    cell = torch.tensor([2 * (2 * row // side) + 2 * column // side for row in range(side) for column in range(side)])
    width = tiny_models.VISION["hidden_size"]
    heads = nn.ModuleList([nn.Linear(width, 11), nn.Linear(width, len(COLOURS) + 1), nn.Linear(width, side * side)])

    def batch_loss(indices: np.ndarray, rng: np.random.Generator) -> Tensor:
        states = features(pool.pixels[indices])
        targets = (
            pool.digits[indices][:, cell],
            pool.colours[indices][:, cell],
            torch.arange(side * side).expand(len(indices), -1),
        )
        return sum(class_loss(head(states), target) for head, target in zip(heads, targets, strict=True))

    optimise("vision", [*tower.parameters(), *heads.parameters()], batch_loss, len(pool), phase, seed)


def class_loss(logits: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def optimise(
    name: str,
    parameters: Iterable[Tensor],
    batch_loss: Callable[[np.ndarray, np.random.Generator], Tensor],
    pool_size: int,
    phase: Phase,
    seed: int,
) -> None:
    """Trains ``parameters`` on ``batch_loss(indices, rng)`` of indices drawn below ``pool_size``."""
    parameters = list(parameters)
    rng = generator("pretrain", name, seed)
    optimiser = torch.optim.AdamW(parameters, lr=phase.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, phase.learning_rate, total_steps=phase.steps, pct_start=0.05
    )
    progress = tqdm(range(phase.steps), desc=f"pretrain {name}", mininterval=1, dynamic_ncols=True)
    for _ in progress:
        loss = batch_loss(rng.integers(pool_size, size=phase.batch), rng)
        if not math.isfinite(loss.item()):
            raise TrainingError(f"pretraining, {name}: the loss is {loss.item()}; lower the phase's learning_rate")
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def pack_batch(tokenizer: Any, conversations: Sequence[Sequence[tuple[str, str]]]) -> Batch:
    """Right-padded `pack` of each conversation, as keyword arguments of LLaVA's forward."""
    columns = zip(*(pack(tokenizer, pairs) for pairs in conversations), strict=True)
    fills = (tokenizer.pad_token_id, IGNORED, -1, 0)
    ids, labels, turn_numbers, positions = (pad(rows, fill) for rows, fill in zip(columns, fills, strict=True))
    return {"input_ids": ids, "labels": labels, "attention_mask": own_turn(turn_numbers), "position_ids": positions}


def pack(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Several single-turn conversations about one image that share its tokens: ids, labels, turn numbers and positions.

    Number 0 is the shared head, image included. Labels are on answers alone.
    """
    head = tokenizer("USER: " + "<image>" * tiny_models.PATCH_COUNT)["input_ids"]
    ids, labels, numbers, positions = list(head), [IGNORED] * len(head), [0] * len(head), list(range(len(head)))
    for number, (prompt, answer) in enumerate(pairs, start=1):
        question = tokenizer(f"{prompt} ASSISTANT:", add_special_tokens=False)["input_ids"]
        reply = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids += question + reply
        labels += [IGNORED] * len(question) + reply
        numbers += [number] * len(question + reply)
        positions += range(len(head), len(head) + len(question + reply))
    return ids, labels, numbers, positions


def own_turn(numbers: Tensor) -> Tensor:
    """Attention of packed conversations: each token sees the head and its own turn so far.

    numbers: turn numbers, (batch, tokens) int64, -1 for padding. Returns (batch, 1, tokens, tokens) bool.
    """
    past = torch.ones(numbers.shape[1], numbers.shape[1]).tril().bool()
    related = (numbers[:, None, :] == 0) | (numbers[:, None, :] == numbers[:, :, None])
    return (past & related)[:, None]


def pad(rows: Iterable[list[int]], fill: int) -> Tensor:
    """Right-pads to an int64 tensor (batch, longest)."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def save(model: Any, processor: Any, out: Path) -> None:
    model.save_pretrained(out)
    processor.save_pretrained(out)
