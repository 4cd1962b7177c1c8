"""The tasks on images, in the order of their numbers in M3ViT's routers."""

from functools import partial

from moezoo.domains.images.tasks import depth, edge, iou, normals, parts, saliency, semseg
from moezoo.tasks import classification
from moezoo.tasks.registry import TaskKind, TaskTable

TASKS = TaskTable(
    {
        "semseg": TaskKind(semseg.task, iou.settings),
        "parts": TaskKind(parts.task, iou.settings),
        "saliency": TaskKind(saliency.task, saliency.settings),
        "normals": TaskKind(normals.task),
        "edge": TaskKind(edge.task, edge.settings),
        "depth": TaskKind(depth.task),
        "scene": TaskKind(partial(classification.whole, "scene"), classification.settings),
    }
)
