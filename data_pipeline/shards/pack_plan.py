"""What a call of pack has to do in a folder that may hold shards already, and when it must refuse.

    nothing there              the inputs are cut into tasks
    the same packing           its own shards are the tasks: done ones are kept, others written
    another, by default        an error that says what differs; nothing is touched
    another, with "append"     its shards stay in front, new inputs become shards behind them
    another, with "replace"    its shards are removed and the inputs are packed anew

A packing is identified by its inputs (source names and bytes) and its settings. A folder without a
manifest holds a packing that was killed: what its records name must be a part of what is asked for.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from model_factory.command_line.plain_text import show

from ..errors import DataPipelineError
from .differences import Differences, refusal, setting_differences
from .existing import (
    Existing,
    read_existing,
    read_shard_record,
    remove_packing,
    remove_shards,
    tar_sources,
)
from .inputs import Input
from .known_inputs import KnownInput, known_inputs
from .manifest import load_manifest
from .tasks import PackConfig, Task, default_samples_per_shard, list_tasks, shard_number

MODES = ("refuse", "append", "replace")
CUT = "samples_per_shard"  # the one setting that decides no byte of a sample


@dataclass(frozen=True)
class PackPlan:
    """Records of the shards that stay in front, and the tasks that follow them."""

    kept: tuple[dict, ...]
    tasks: tuple[Task, ...]


def plan_packing(
    inputs: list[Input],
    output: Path,
    config: PackConfig,
    num_jobs: int = 1,
    mode: str = "refuse",
    report=show,
    is_array: bool = False,
) -> PackPlan:
    """Plan of packing these inputs into a folder; with mode "replace" the old shards are removed.

    With `is_array`, other jobs make the same plan at other times, so it does not depend on what any
    of them has finished. Raises DataPipelineError, with nothing changed, when the folder holds
    another packing.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; choose one of {', '.join(MODES)}")
    found = read_existing(output)
    if found.damage is not None:
        report(f"{found.damage}: it is written anew from the records of the shards")
    if mode == "append":
        return _appended(
            inputs=inputs,
            found=found,
            config=config,
            num_jobs=num_jobs,
            is_array=is_array,
            report=report,
        )
    plan, differences = _continued(inputs, found, config, num_jobs)
    if not differences:
        _leftovers(found, plan, mode, report)
        return plan
    if mode == "refuse":
        raise refusal(output, differences, "holds another packing")
    plan = _fresh(inputs, config, num_jobs)
    _loose_sources(found, plan)  # whose errors come before anything is removed
    remove_packing(found)
    report(f"removed the {len(found.names)} shards that {output} held")
    return plan


def _loose_sources(found: Existing, plan: PackPlan) -> list[str]:
    """Inputs in tars without a record that the plan will write over: a run was killed between the
    two. Raises DataPipelineError for a tar that the packer never wrote.
    """
    sources: list[str] = []
    for name in sorted({task.name for task in plan.tasks}.intersection(found.loose)):
        held = tar_sources(found.directory / f"{name}.tar")
        if held is None:
            raise DataPipelineError(
                f"{found.directory / name}.tar was not written by this command, or is damaged, and "
                "would be overwritten: name another --output, or move that file away"
            )
        sources += held
    return sources


def _fresh(inputs: list[Input], config: PackConfig, num_jobs: int) -> PackPlan:
    size = config.samples_per_shard or default_samples_per_shard(len(inputs), num_jobs)
    return PackPlan((), tuple(list_tasks(inputs, config, size)))


def _leftovers(found: Existing, plan: PackPlan, mode: str, report) -> None:
    """Shards of an append that was killed, beside a whole packing that is asked for once more."""
    names = {task.name for task in plan.tasks}
    left = [name for name in found.unbound if name not in names]
    if left and mode == "replace":
        remove_shards(found.directory, left)
    elif left:
        report(
            f"{len(left)} finished shards of an --append that was stopped are not part of the set, "
            f"{left[0]} first: the same --append finishes it, --replace removes them"
        )


def _continued(
    inputs: list[Input], found: Existing, config: PackConfig, num_jobs: int
) -> tuple[PackPlan, Differences]:
    size = config.samples_per_shard or found.settings.get(CUT)
    if type(size) is not int or size < 1:
        size = default_samples_per_shard(len(inputs), num_jobs)
    differences = Differences(_other_settings(found, config.settings(size)))
    if found.bound:
        tasks = _recorded_tasks(inputs, found, config.settings(size), differences)
    else:
        tasks = list_tasks(inputs, config, size)
        _compare_unbound(inputs, tasks, found, differences)
    plan = PackPlan((), tuple(tasks))
    given = {item.source for item in inputs}
    differences.gone += [name for name in _loose_sources(found, plan) if name not in given]
    return plan, differences


def _other_settings(found: Existing, asked: dict) -> list[str]:
    return setting_differences(found.settings, asked) if found.names else []


class _Waiting:
    """Given inputs by source name, taken by the shards that hold them."""

    def __init__(self, inputs: Iterable[Input]):
        self._items: dict[str, deque[Input]] = defaultdict(deque)
        self._order = list(inputs)
        for item in self._order:
            self._items[item.source].append(item)

    def first(self, source: str) -> Input | None:
        """The next input of a name, left where it is."""
        items = self._items.get(source)
        return items[0] if items else None

    def count(self, source: str) -> int:
        """How many inputs of a name nobody took."""
        return len(self._items.get(source, ()))

    def take(self, source: str) -> Input | None:
        """The next input of a name, which nobody else gets."""
        items = self._items.get(source)
        return items.popleft() if items else None

    def rest(self) -> list[Input]:
        """What nobody took, in the order given."""
        left = {id(item) for items in self._items.values() for item in items}
        return [item for item in self._order if id(item) in left]


def _recorded_tasks(
    inputs: list[Input], found: Existing, settings: dict, differences: Differences
) -> list[Task]:
    """A task for each shard of the manifest, with the inputs that its record names.

    A shard whose record is damaged takes the inputs that no other shard claims: the manifest knows
    how many they are.
    """
    waiting = _Waiting(inputs)
    records = [found.records.get(entry["name"]) for entry in found.bound]
    stated = Counter(
        known.source for record in records if record is not None for known in known_inputs(record)
    )
    tasks: list[Task | None] = []
    for record in records:
        if record is None:
            tasks.append(None)
        else:
            tasks.append(_claim(record, waiting, stated, differences))
    rest = waiting.rest()
    filled = []
    for entry, task in zip(found.bound, tasks, strict=True):
        if task is None:
            count = entry["num_samples"] + entry["num_rejected"]
            task = Task(
                name=entry["name"],
                inputs=tuple(rest[:count]),
                settings=settings,
                distrusts_record=entry["name"] in found.damaged,
            )
            if len(task.inputs) < count:
                differences.gone.append(f"one of {entry['name']}, whose record is damaged,")
            rest = rest[count:]
        filled.append(task)
    differences.new += [item.source for item in rest]
    return filled


def _claim(record: dict, waiting: _Waiting, stated: Counter[str], differences: Differences) -> Task:
    """Task of a recorded shard; what it lacks or what changed goes to `differences`.

    `stated` counts, for each source, the records from this one on that state it.
    """
    items: list[Input] = []
    superseded = {}
    pairs: list[tuple[KnownInput, Input]] = []
    for known in known_inputs(record):
        later = stated[known.source] - 1
        stated[known.source] = later
        if known.rejected is not None and 0 < waiting.count(known.source) <= later:
            # rejected here, and appended once the file was another one: that shard takes it
            superseded[known.source] = known.rejected
            item = waiting.first(known.source)
        else:
            item = waiting.take(known.source)
            if item is None:
                differences.gone.append(known.source)
            else:
                pairs.append((known, item))
        if item is not None:
            items.append(item)
    differences.compare(record, pairs)
    return Task(record["name"], tuple(items), record["settings"], superseded)


def _compare_unbound(
    inputs: list[Input], tasks: list[Task], found: Existing, differences: Differences
) -> None:
    """Compare the records of a packing that was stopped with the tasks of the same numbers."""
    given = {item.source for item in inputs}
    by_name = {task.name: task for task in tasks}
    stated = {name: known_inputs(record) for name, record in found.records.items()}
    everything = {known.source for shard in stated.values() for known in shard}
    for name in found.unbound:
        differences.gone += [known.source for known in stated[name] if known.source not in given]
        items = by_name[name].inputs if name in by_name else ()
        differences.new += [item.source for item in items if item.source not in everything]
        if [item.source for item in items] == [known.source for known in stated[name]]:
            pairs = list(zip(stated[name], items, strict=True))
            differences.compare(found.records[name], pairs)
            asked = by_name[name].settings
            other = setting_differences(found.records[name]["settings"], asked)
            differences.settings = differences.settings or other
        else:
            differences.moved += [f"those of {name}"]


def _appended(
    inputs: list[Input],
    found: Existing,
    config: PackConfig,
    num_jobs: int,
    is_array: bool,
    report,
) -> PackPlan:
    other = _other_settings(found, config.settings(found.settings.get(CUT, 1)))
    if other:
        raise refusal(found.directory, Differences(other), "was packed with other settings")
    kept = load_manifest(found.directory).shards if found.bound else ()
    new = _not_packed(inputs, kept, found)
    size = config.samples_per_shard or default_samples_per_shard(len(new), num_jobs)
    if found.unbound and config.samples_per_shard is None:
        size = found.records[found.unbound[0]]["settings"][CUT]
    tasks = list_tasks(new, config, size, first=_next_number(kept))
    differences = Differences()
    _compare_unbound(new, tasks, found, differences)
    if differences and is_array:
        what = "holds shards of another --append that was stopped"
        raise refusal(found.directory, differences, what)
    if differences:
        kept = (*kept, *_adopted(found, report))
        new = _not_packed(inputs, kept, found)
        tasks = list_tasks(new, config, size, first=_next_number(kept))
    plan = PackPlan(tuple(kept), tuple(tasks))
    given = {item.source for item in inputs}
    lost = [name for name in _loose_sources(found, plan) if name not in given]
    if lost:
        raise refusal(found.directory, Differences(gone=lost), "holds a tar without its record")
    if kept:
        report(
            f"{found.directory} holds {len(kept)} shards: {len(new)} new inputs go behind them, "
            f"{len(inputs) - len(new)} are packed already"
        )
    return plan


def _next_number(kept: Iterable[dict]) -> int:
    return 1 + max((shard_number(record["name"]) for record in kept), default=-1)


def _not_packed(inputs: list[Input], kept: Iterable[dict], found: Existing) -> list[Input]:
    """Inputs that made no sample yet: those that no shard names, and rejected ones whose file is
    another one by now.
    """
    latest: dict[str, KnownInput] = {}
    for record in kept:
        latest |= {known.source: known for known in known_inputs(record)}
    new = []
    differences = Differences()
    for item in inputs:
        known = latest.get(item.source)
        if known is None:
            new.append(item)
        elif not known.is_now(item):
            if known.rejected is None:
                differences.changed.append(item.source)
            else:
                new.append(item)
    if differences:
        raise refusal(found.directory, differences, "holds other samples of these names")
    return new


def _adopted(found: Existing, report) -> list[dict]:
    """Records of shards that an append of other inputs finished before it was stopped."""
    broken = [name for name in found.unbound if not found.is_whole(name)]
    if broken:
        raise DataPipelineError(
            f"{found.directory / broken[0]}.tar is not what its record says, and no manifest names "
            f"it: remove {broken[0]}.json, and start again"
        )
    report(
        f"{len(found.unbound)} finished shards of an --append that was stopped are kept, "
        f"{found.unbound[0]} first"
    )
    paths = [found.directory / f"{name}.json" for name in found.unbound]
    return [record for record in map(read_shard_record, paths) if record is not None]
