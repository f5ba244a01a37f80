"A training step asks a GPU for nothing, and its loss is what it was when it did."
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import complete_box_iou_loss

from yolov9001.data.dataset import make_digits
from yolov9001.detection import loss as room
from yolov9001.detection.loss import (DetectionLoss, DualLoss, TaskAlignedAssigner, anchor_points, candidate_cells,
    decode_boxes, flatten_levels, settle_conflicts)
from yolov9001.model import YOLOv9001
from yolov9001.train import Trainer, train_one_epoch
from yolov9001.training.config import TrainConfig
from yolov9001.training.distributed import Replica, World
from yolov9001.training.optimize import EMA


def former_assignment(assigner, scores, boxes, points, targets):
    "By lists of candidates, as it was before: image, row, cell and score of each foreground cell"
    image, row = (targets[..., 0] >= 0).nonzero(as_tuple=True)
    objects = targets[image, row]
    inside = candidate_cells(points, objects[:, 1:], assigner.smallest)
    item, cell = inside.nonzero(as_tuple=True)
    overlap = (1 - complete_box_iou_loss(boxes[image[item], cell], objects[item, 1:])).clamp(min=0)
    metric = scores[image[item], cell, objects[item, 0].long()] ** assigner.alpha * overlap ** assigner.beta
    metric, overlap = (value.new_full(inside.shape, -1.).index_put_((item, cell), value) for value in (metric, overlap))
    metric, best = metric.topk(min(assigner.topk, len(points)))
    overlap = overlap.gather(1, best)
    cells = image[:, None] * len(points) + best
    chosen = settle_conflicts(cells, overlap, math.prod(scores.shape[:2]))
    metric, overlap = metric * chosen, overlap * chosen
    score = metric * overlap.amax(-1, keepdim=True) / metric.amax(-1, keepdim=True).clamp(min=1e-9)
    which, slot = chosen.nonzero(as_tuple=True)
    return image[which], row[which], best[which, slot], score[which, slot]


def former_hiding(logits, wanted, points, targets):
    image, row = (targets[..., 0] < -1).nonzero(as_tuple=True)
    difficult = targets[image, row]
    which, cell = candidate_cells(points, difficult[:, 1:]).nonzero(as_tuple=True)
    hidden = torch.zeros_like(logits, dtype=torch.bool)
    hidden[image[which], cell, -2 - difficult[which, 0].long()] = True
    return logits.masked_fill(hidden & (wanted == 0), -1e4)


def former_loss(logits, targets):
    classes = flatten_levels(logits[1::2])
    boxes = decode_boxes([level.sigmoid() for level in logits[0::2]])
    points, _ = anchor_points([level.shape[-2:] for level in logits[0::2]])
    with torch.no_grad(): found = former_assignment(TaskAlignedAssigner(), classes.sigmoid(), boxes, points, targets)
    image, row, cell, weight = found
    total = weight.sum().clamp(min=1)
    wanted = targets[image, row]
    soft = torch.zeros_like(classes)
    soft[image, cell, wanted[:, 0].long()] = weight
    box = (complete_box_iou_loss(boxes[image, cell], wanted[:, 1:]) * weight).sum() / total
    hidden = former_hiding(classes, soft, points, targets)
    return 7.5 * box, .5 * F.binary_cross_entropy_with_logits(hidden, soft, reduction='sum') / total


def random_batch(seed, images=4, classes=5, most=12, side=128):
    "Logits of three levels, and targets: objects, difficult ones, padding, and an image with neither"
    generator = torch.manual_seed(seed)
    logits = [torch.randn(images, c, side // s, side // s, generator=generator) for s in (8, 16, 32) for c in (4, classes)]
    for level in logits[0::2]: level -= 1.5             # boxes about as large as the objects
    corner = torch.rand(images, most, 2, generator=generator) * side * .8
    sides = 2 + torch.rand(images, most, 2, generator=generator) * side / 2
    kind = torch.randint(-classes - 1, classes, (images, most, 1), generator=generator).float()
    targets = torch.cat([kind, corner, (corner + sides).clamp(max=side)], -1)
    targets[kind[..., 0] == -1] = -1.
    targets[0] = -1.
    return [level.requires_grad_() for level in logits], targets


@pytest.mark.parametrize('seed', range(8))
def test_the_loss_is_the_same_as_by_lists_of_candidates(seed):
    results = []
    for loss in (former_loss, DetectionLoss()):
        logits, targets = random_batch(seed)
        parts = loss(logits, targets)
        sum(parts).backward()
        results.append([*parts, *(level.grad for level in logits)])
    assert results[0][0] > .1 and (targets[..., 0] < -1).any()
    for before, now in zip(*results): torch.testing.assert_close(now, before, rtol=1e-4, atol=1e-5)


def test_without_any_object():
    logits, targets = random_batch(0)
    box, classes = DetectionLoss()(logits, torch.full_like(targets, -1.))
    (box + classes).backward()
    assert box == 0 and all(level.grad.isfinite().all() for level in logits)


def test_what_is_not_a_number_shows():
    logits, targets = random_batch(1)
    with torch.no_grad(): logits[0][1, 0] = math.nan
    assert sum(DetectionLoss()(logits, targets)).isnan()


class NoQuestions(TorchDispatchMode):
    "Refuses operators that let the CPU wait for a GPU: a number of a tensor, a choice by a mask"
    refused = 'aten._local_scalar_dense', 'aten.nonzero', 'aten.masked_select', 'aten._unique', 'aten.unique'
    on_cpu = False

    def __torch_dispatch__(self, operator, types, args=(), options=None):
        name = str(operator)
        indices = args[1] if name.startswith(('aten.index.', 'aten.index_put')) else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if not self.on_cpu and (name.startswith(self.refused) or by_mask): raise AssertionError(f'asks the device: {name}')
        return operator(*args, **options or {})


@pytest.fixture
def no_questions(monkeypatch):
    "The objects are listed on the CPU, where targets are"
    mode, listed = NoQuestions(), room.list_objects
    def list_on_cpu(chosen, targets, device):
        mode.on_cpu = True
        try: return listed(chosen, targets, device)
        finally: mode.on_cpu = False
    monkeypatch.setattr(room, 'list_objects', list_on_cpu)
    return mode


@pytest.mark.parametrize('question', [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: bool((x > 0).any()),
                                      lambda x: x.masked_select(x > 0)])
def test_questions_are_noticed(no_questions, question):
    with no_questions, pytest.raises(AssertionError, match='asks the device'): question(torch.randn(3))


def test_torchvisions_loss_asks(no_questions):
    boxes = torch.tensor([[0., 0, 9, 9]])
    with no_questions, pytest.raises(AssertionError, match='asks the device'): complete_box_iou_loss(boxes, boxes + 1)


def test_the_loss_and_its_gradient_ask_nothing(no_questions):
    logits, targets = random_batch(2)
    with no_questions: DualLoss()(2 * logits, targets)[0].backward()
    assert logits[0].grad.any()


def test_a_whole_step_asks_nothing(no_questions):
    torch.manual_seed(0)
    model = YOLOv9001(3)
    replica = Replica(model, World('cpu'), batch_size=2, precision='float32')
    optimizer = torch.optim.SGD(model.parameters(), lr=.01, momentum=.9)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    targets = torch.tensor([[[1, 8., 8, 40, 40]], [[-3, 20., 20, 60, 60]]])
    before = [p.detach().clone() for p in model.parameters()]
    losses = []
    with no_questions:
        train_one_epoch(replica, [(images, targets)], [.01], DualLoss(), optimizer, EMA(model), losses.append)
    assert all(loss.isfinite() for loss in losses[0].values())
    assert any(not p.equal(old) for p, old in zip(model.parameters(), before))


@pytest.fixture
def trainer(tmp_path):
    data = make_digits(tmp_path/'digits', train=26, val=2)
    return Trainer(TrainConfig(str(data), str(tmp_path/'run'), input_size='64', epochs=1, batch_size=1, mosaic=0, device='cpu'))


def test_losses_are_read_every_tenth_step(trainer, monkeypatch):
    "All of them count, and history has their mean"
    looks, seen = [], []
    look, after = Trainer._look, Trainer.after_step
    def note(self):
        looks.append(self.batch)
        look(self)
    def keep(self, losses):
        seen.append(sum(loss.item() for loss in losses.values()))
        after(self, losses)
    monkeypatch.setattr(Trainer, '_look', note)
    monkeypatch.setattr(Trainer, 'after_step', keep)
    trainer.after_step = lambda losses: keep(trainer, losses)
    row = trainer.run_epoch()
    assert looks == [1, 11, 21, 26]
    assert row['box'] + row['class'] == pytest.approx(sum(seen) / 26)


def test_a_loss_that_is_no_number_ends_the_run_within_ten_steps(trainer):
    from yolov9001.core import InputError
    loss, steps = trainer.loss, []
    def broken(outputs, targets):
        steps.append(len(steps))
        total, parts = loss(outputs, targets)
        return total, parts | ({'box': parts['box'] * math.nan} if len(steps) == 5 else {})
    trainer.loss = broken
    with pytest.raises(InputError, match='loss nan in epoch 1.*lower lr'): trainer.run_epoch()
    assert len(steps) == 11 and not list(trainer.out.glob('*.pt'))


def test_a_compiled_model_learns_the_same(monkeypatch):
    "Traced with its gradients, without the code generator, which takes minutes"
    compile = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda model: compile(model, backend='aot_eager'))
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.manual_seed(0))
    targets = torch.tensor([[[1, 8., 8, 40, 40]], [[0, 20., 20, 60, 60]]])
    losses = []
    for choice in ('no', 'yes'):
        torch.manual_seed(0)
        model = YOLOv9001(3)
        replica = Replica(model, World('cpu'), batch_size=2, precision='float32', compile=choice)
        assert replica.model is model
        optimizer = torch.optim.SGD(model.parameters(), lr=.01)
        train_one_epoch(replica, 3 * [(images, targets)], 3 * [.01], DualLoss(), optimizer, EMA(model),
                        lambda parts: losses.append(sum(parts.values()).item()))
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-4) and losses[2] != losses[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_a_step_on_a_gpu_waits_for_nothing():
    "By PyTorch's own watch; written without a GPU"
    world = World('cuda')
    model = YOLOv9001(3).to(world.device, memory_format=torch.channels_last)
    replica = Replica(model, world, batch_size=2, precision='bfloat16')
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8).pin_memory()
    targets = torch.tensor([[[1, 8., 8, 40, 40]], [[-3, 20., 20, 60, 60]]]).pin_memory()
    def step(): train_one_epoch(replica, [(images, targets)], [.001], DualLoss(), optimizer, EMA(model))
    step()
    torch.cuda.set_sync_debug_mode('error')
    try: step()
    finally: torch.cuda.set_sync_debug_mode('default')
