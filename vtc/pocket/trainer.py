"""One training state of a pocket model: forward pass, losses, update, validation, checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vtc.pocket.batches import IGNORE, Batch, prefix_tokens
from vtc.pocket.errors import PocketError
from vtc.pocket.model import (
    GRID,
    MENTION_TARGET_SIZES,
    N_PATCHES,
    PATCH_TARGET_SIZES,
    AuxiliaryHeads,
    MentionHeads,
    PositionHead,
    RelationHead,
    build_model,
    decode_packed,
    encode_images,
    half_way,
    project,
)
from vtc.pocket.recipes import Recipe, Stage, fingerprint, stage_config

_PATCH_TARGET_NAMES = ("color", "shape", "digit", "word", "partner", "center")
_MENTION_TARGET_NAMES = ("count", "column", "row", "digit", "color", "shape")
_RELATION_TARGET_NAMES = ("is right", "is below", "asks vertical", "asks far", "agrees")
_NONE_WEIGHTS = (0.15, 0.15, 0.15, 0.15, 0.15, 0.3)  # most patches show nothing: count class 0 less
_WEIGHT_DECAY = 0.05
_BETAS = (0.9, 0.98)
_GRADIENT_NORM = 1.0


class Trainer:
    """Model, heads, float32 master weights and optimizer of one stage.

    Forward and backward run in the recipe's dtype on working copies; the optimizer updates the masters, which are then
    copied back. Without masters, bfloat16 weights would swallow most updates.
    """

    def __init__(self, recipe: Recipe, stage: Stage, seed: int, weights: dict[str, dict[str, Tensor]] | None) -> None:
        self.stage = stage
        self.seed = seed
        self.step = 0
        self.dtype = getattr(torch, recipe.dtype)
        self.model = build_model(stage_config(recipe.model, stage.name), seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.heads = AuxiliaryHeads(recipe.model.width)
            self.mentions = MentionHeads(recipe.model.width)
            self.positions = PositionHead(recipe.model.width)
            self.relations = RelationHead(recipe.model.width)
        self._modules = {
            "model": self.model,
            "heads": self.heads,
            "mentions": self.mentions,
            "positions": self.positions,
            "relations": self.relations,
        }
        if weights is not None:
            missing, unexpected = self.model.load_state_dict(weights["model"], strict=False)
            if unexpected or [name for name in missing if not (stage.name == "N" and name.endswith("image_newline"))]:
                raise PocketError(f"these weights are of another model: missing {missing}, unexpected {unexpected}")
            for part in set(self._modules) & set(weights) - {"model"}:  # grown weights come without the read-outs
                self._modules[part].load_state_dict(weights[part])
        self.model.train()
        # Stage A never runs projector and decoder: their gradients stay None and the optimizer passes them over.
        self._working = {
            f"{part}.{name}": weight for part, module in self._modules.items() for name, weight in module.named_parameters()
        }
        self._masters = {name: weight.detach().clone().float().requires_grad_() for name, weight in self._working.items()}
        self.optimizer = torch.optim.AdamW(self._parameter_groups(), lr=stage.learning_rate, betas=_BETAS, foreach=True)
        for module in self._modules.values():
            module.to(self.dtype)
        self._prefix = prefix_tokens()

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Tower, read-outs, the rest; each with and without weight decay (matrices that are not embeddings)."""
        groups: dict[tuple[bool, bool, bool], list[Tensor]] = defaultdict(list)
        for name, weight in self._masters.items():
            is_vision = "vision_tower" in name or name.startswith("heads.")
            is_head = not name.startswith("model.")
            groups[is_vision, is_head, weight.dim() >= 2 and "embed" not in name].append(weight)
        return [
            {"params": weights, "weight_decay": _WEIGHT_DECAY * decays, "is_vision": is_vision, "is_head": is_head}
            for (is_vision, is_head, decays), weights in sorted(groups.items())
        ]

    def train_step(self, batch: Batch) -> dict[str, float]:
        """Make one update and return the losses."""
        stage, vision_rate = self.stage, self.stage.vision_rate(self.step)
        warming = self.step < stage.warm_heads
        for group in self.optimizer.param_groups:
            group["lr"] = stage.rate(self.step) * (vision_rate if group["is_vision"] else 1.0)
            if warming:
                group["lr"] = stage.learning_rate if group["is_head"] else 0.0
        with torch.set_grad_enabled(vision_rate > 0 and not warming):
            features, pooled = encode_images(self.model, batch.pixels(self.dtype))
        losses: dict[str, Tensor] = {}
        total = torch.zeros(())
        if vision_rate > 0 or warming:
            losses["patch"], losses["content"] = self._auxiliary_losses(features, pooled, batch)
            total = stage.patch_weight * losses["patch"] + stage.content_weight * losses["content"]
        if stage.asks:
            visual, asked = project(self.model, features, batch.grid), batch.answer_targets != IGNORE
            hidden, states = self._decode(visual, batch)
            logits = self.model.lm_head(hidden[asked]).float()
            losses["answer"] = F.cross_entropy(logits, batch.answer_targets[asked])
            total = total + losses["answer"]
            losses["mention"] = self._mention_loss(states[half_way(states)], batch)
            total = total + stage.mention_weight * losses["mention"]
            related = batch.relation_targets != IGNORE
            if stage.relation_weight and related.any():
                truths = batch.relation_targets[related].float()
                losses["relation"] = F.binary_cross_entropy_with_logits(self.relations(states)[related], truths)
                total = total + stage.relation_weight * losses["relation"]
            if stage.position_weight and batch.grid is None:
                losses["position"] = self._position_loss(visual)
                total = total + stage.position_weight * losses["position"]
        total.backward()
        self._update()
        self.step += 1
        return {name: loss.item() for name, loss in losses.items()}

    def _update(self) -> None:
        for name, master in self._masters.items():
            gradient = self._working[name].grad
            master.grad = None if gradient is None else gradient.float()
            self._working[name].grad = None
        self._average_gradients()
        trained = [master for master in self._masters.values() if master.grad is not None]
        nn.utils.clip_grad_norm_(trained, _GRADIENT_NORM, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            for name, master in self._masters.items():
                self._working[name].copy_(master)

    def _average_gradients(self) -> None:
        """Average over the processes of the run; all of them train the same weights at any step."""
        if not torch.distributed.is_initialized():
            return
        gradients = [master.grad for master in self._masters.values() if master.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _decode(self, visual: Tensor, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        return decode_packed(self.model, visual, self._prefix, batch.tokens, batch.segments, batch.positions)

    def _mention_loss(self, middle: Tensor, batch: Batch) -> Tensor:
        said = batch.mention_targets[..., 0] != IGNORE
        targets, loss = batch.mention_targets[said], torch.zeros(())
        parts = self.mentions(middle[said]).split(MENTION_TARGET_SIZES, dim=-1)
        for kind, logits in enumerate(parts):
            if (targets[:, kind] != IGNORE).any():
                loss = loss + F.cross_entropy(logits, targets[:, kind], ignore_index=IGNORE)
        return loss / len(parts)

    def _position_loss(self, visual: Tensor) -> Tensor:
        cells = torch.arange(N_PATCHES).repeat(len(visual))
        columns, rows = (logits.flatten(0, 1) for logits in self.positions(visual))
        return F.cross_entropy(columns, cells % GRID) + F.cross_entropy(rows, cells // GRID)

    def _auxiliary_losses(self, features: Tensor, pooled: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        patch_logits, content_logits = self.heads(features, pooled)
        patch_loss = torch.zeros(())
        parts = patch_logits.split(PATCH_TARGET_SIZES, dim=-1)
        for kind, (logits, none_weight) in enumerate(zip(parts, _NONE_WEIGHTS, strict=True)):
            weights = logits.new_ones(logits.shape[-1])
            weights[0] = none_weight
            targets = batch.patch_targets[..., kind].reshape(-1)
            patch_loss = patch_loss + F.cross_entropy(logits.reshape(len(targets), -1), targets, weights)
        known = batch.contents[:, 0] >= 0
        return patch_loss, F.binary_cross_entropy_with_logits(content_logits[known], batch.contents[known])

    @torch.no_grad()
    def validate(self, batches: Sequence[Batch]) -> dict[str, dict[str, float]]:
        """Accuracy per question type, of the noun phrases' read-outs, and of the patch heads where something is shown."""
        hits: dict[str, list[bool]] = defaultdict(list)
        probes: dict[str, list[bool]] = defaultdict(list)
        said: dict[str, list[bool]] = defaultdict(list)
        for batch in batches:
            features, pooled = encode_images(self.model, batch.pixels(self.dtype))
            patch_logits, _ = self.heads(features, pooled)
            for kind, logits in enumerate(patch_logits.split(PATCH_TARGET_SIZES, dim=-1)):
                if batch.grid is not None:
                    break
                targets = batch.patch_targets[..., kind]
                shown = targets > 0
                probes[_PATCH_TARGET_NAMES[kind]] += (logits.argmax(-1)[shown] == targets[shown]).tolist()
            if self.stage.asks:
                hidden, states = self._decode(project(self.model, features, batch.grid), batch)
                predicted = self.model.lm_head(hidden).argmax(-1)
                guesses = self.mentions(states[half_way(states)]).split(MENTION_TARGET_SIZES, dim=-1)
                for kind, logits in enumerate(guesses):
                    targets = batch.mention_targets[..., kind]
                    known = targets != IGNORE
                    said[_MENTION_TARGET_NAMES[kind]] += (logits.argmax(-1)[known] == targets[known]).tolist()
                found = self.relations(states) > 0
                for name, guess, truth in zip(
                    _RELATION_TARGET_NAMES, found.unbind(-1), batch.relation_targets.unbind(-1), strict=True
                ):
                    known = truth != IGNORE
                    said[name] += (guess[known] == (truth[known] == 1)).tolist()
                for kind_name, is_right in batch.marks(predicted):
                    hits[kind_name].append(is_right)
        return {
            "answers": {kind: round(sum(v) / len(v), 4) for kind, v in sorted(hits.items())},
            "mentions": {kind: round(sum(v) / max(1, len(v)), 4) for kind, v in said.items()},
            "patches": {kind: round(sum(v) / max(1, len(v)), 4) for kind, v in probes.items()},
        }

    # ------------------------------------------------------------------------------------------ persistence

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Float32 state dicts of model and heads."""
        return {
            part: {
                name: self._masters.get(f"{part}.{name}", value).detach().float().clone()
                for name, value in module.state_dict().items()
            }
            for part, module in self._modules.items()
        }

    def save(self, path: Path, recipe: Recipe) -> None:
        """Write a checkpoint; a crash half-way leaves the previous one in place."""
        contents = {
            "fingerprint": fingerprint(recipe, self.stage, self.seed),
            "stage": self.stage.name,
            "step": self.step,
            "seed": self.seed,
            "model_config": asdict(recipe.model),
            "weights": self.weights(),
            "optimizer": self.optimizer.state_dict(),
        }
        unfinished = path.with_suffix(".tmp")
        torch.save(contents, unfinished)
        unfinished.replace(path)

    @classmethod
    def load(cls, path: Path, recipe: Recipe, stage: Stage, seed: int) -> Trainer:
        """Continue from a checkpoint.

        Raises
        ------
        PocketError
            If it was written with other settings.
        """
        saved = torch.load(path, weights_only=True)
        if saved["fingerprint"] != fingerprint(recipe, stage, seed):
            raise PocketError(f"{path} was written with another recipe or seed; use another --out")
        trainer = cls(recipe, stage, seed, saved["weights"])
        trainer.optimizer.load_state_dict(saved["optimizer"])
        trainer.step = saved["step"]
        return trainer
