"""Which files `hatchery upscale` works on, and under which names results are written: all decided before work."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.image_files import EXTENSIONS, PassedOver
from data_prep.sources import iter_images
from model.picture import FORMATS, Outline, check_target, read_outline, refuse_what_it_cannot_hold
from pipeline.upscale_image import Wanted

LARGEST_NAME_BYTES = 255
"""Where the file system does not say."""
NAMED = 3
"""So many files are named where there are more of a kind."""
AUTO = "auto"
FALLBACK = ".png"
"""What holds all that is read, where the ending of an image's name does not."""


@dataclass(frozen=True)
class Job:
    """One image file and where its result goes."""

    source: Path
    target: Path


@dataclass(frozen=True)
class Naming:
    """How results are called."""

    format: str = AUTO
    """An ending without its dot; `auto`: the image's own, or PNG where that cannot hold what the file has."""
    suffix: str = ""
    """Between name and ending, for the results of folders or in folders."""
    has_alpha: bool = True
    """Whether results keep alpha."""

    def __post_init__(self) -> None:
        if self.format != AUTO and f".{self.format.lower().lstrip('.')}" not in FORMATS:
            names = ", ".join(ending[1:] for ending in FORMATS)
            raise ValueError(f"--format {self.format}: choose among {AUTO}, {names}")
        if os.sep in self.suffix or "\0" in self.suffix:
            raise ValueError(f"--suffix {self.suffix}: it goes into the names of files, so it may hold no {os.sep}")

    @property
    def ending(self) -> str | None:
        """With its dot; None where each image keeps its own."""
        return None if self.format == AUTO else f".{self.format.lower().lstrip('.')}"


@dataclass
class Plan:
    """What is to be done, and what is to be said before."""

    jobs: list[Job] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Images of a folder that cannot be done, and why."""


def plan(source: str, target: str, naming: Naming | None = None, passed_over: PassedOver | None = None) -> Plan:
    """The files to work on. ValueError for a source that is missing or empty, and for a target that cannot be.

    A folder's images keep their names and places below the target; a single one may be given a folder, too. What is
    no image is counted in `passed_over`.
    """
    if not source or not target:
        raise ValueError(f"{'OUT' if source else 'IN'} is empty: name an image or a folder ('.' is this one)")
    try:
        return _planned(source, target, naming or Naming(), PassedOver() if passed_over is None else passed_over)
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise ValueError(f"{error.filename or target} cannot be looked at: {error.strerror or error}") from error


def _planned(source: str, target: str, naming: Naming, passed_over: PassedOver) -> Plan:
    _refuse_unwritable(Path(target))
    if Path(source).is_dir():
        made = _of_folder(Path(source), target, naming, passed_over)
    elif Path(source).is_file():
        made = _of_file(Path(source), target, naming)
    elif os.path.lexists(source) and not os.path.exists(source):
        raise ValueError(f"{source} is a link to what is not there: name an image or a folder of images")
    elif os.path.exists(source):
        raise ValueError(f"{source} is neither a file nor a folder: name an image or a folder of images")
    else:
        raise ValueError(f"{source} does not exist: name an image or a folder of images")
    _refuse_overwriting(made.jobs, target)
    return made


def _of_file(source: Path, target: str, naming: Naming) -> Plan:
    """The job of a single image. ValueError where its result cannot be, as far as its header tells."""
    into, outline, made = Path(target), _outline(source), Plan()
    if into.is_dir() or target.endswith(os.sep):
        job = Job(source, into / _result_name(source, naming, outline))
        _refuse_name(job.target)
        _note_renamed([source.name] * _is_renamed(job, naming), made)
    else:
        if naming.suffix:
            raise ValueError(f"--suffix is for results in folders, and OUT names a file: {target}")
        if into.suffix.lower() not in FORMATS:
            raise ValueError(
                f"{target}: choose an ending among {', '.join(FORMATS)}, or end it in {os.sep} for a folder"
            )
        if naming.ending and FORMATS[naming.ending] is not FORMATS[into.suffix.lower()]:
            raise ValueError(f"--format {naming.format} is not what {target} ends in: leave one of them out")
        job = Job(source, into)
    _refuse_folder(job.target)
    _refuse_loss(job, naming, outline)
    made.jobs.append(job)
    return made


def _of_folder(source: Path, target: str, naming: Naming, passed_over: PassedOver) -> Plan:
    into = Path(target)
    if into.exists() and not into.is_dir():
        raise ValueError(f"{target} is a file: name a folder for the images of {source}")
    found = [Path(source, info.path) for info in iter_images(str(source), passed_over)]
    images = [path for path in found if not _is_below(path, into, source)]
    made = Plan()
    images = _without_earlier_results(images, into, source, naming, made)
    if not images:
        besides = f" ({said})" if (said := passed_over.describe()) else ""
        raise ValueError(f"{source} holds no images: their names end in .{', .'.join(EXTENSIONS)}{besides}")
    if not into.exists() and into.suffix.lower() in FORMATS and not target.endswith(os.sep):
        raise ValueError(
            f"{target} is called like an image, and {source} is a folder: name a folder for its images "
            f"({target}{os.sep} if that is what it is to be called)"
        )
    refused = []
    for path in images:
        outline = _outline(path)
        job = Job(path, into / path.relative_to(source).parent / _result_name(path, naming, outline))
        try:
            _refuse_name(job.target)
            _refuse_folder(job.target)
            _refuse_loss(job, naming, outline)
        except ValueError as error:
            made.problems.append(f"{path}: {error}")
            refused.append(path.name)
            continue
        made.jobs.append(job)
    if refused:
        made.notes.append(f"cannot be done, for reasons that are told at the end: {_some(refused)}")
    _note_renamed([job.source.name for job in made.jobs if _is_renamed(job, naming)], made)
    return made


def _is_renamed(job: Job, naming: Naming) -> bool:
    """Whether the result has another ending than its image, unasked."""
    return naming.ending is None and job.target.suffix != job.source.suffix


def _note_renamed(names: list[str], made: Plan) -> None:
    if names:
        made.notes.append(f"written as PNG, since the name's ending cannot hold 16 bits or alpha: {_some(names)}")


def _without_earlier_results(images: list[Path], into: Path, source: Path, naming: Naming, made: Plan) -> list[Path]:
    """Where results lie beside their images, the images alone: a result has an image's name and the suffix."""
    if not naming.suffix or into.resolve() != source.resolve():
        return images
    stems = {(path.parent, path.stem) for path in images}
    earlier = {
        path
        for path in images
        if path.stem.endswith(naming.suffix) and (path.parent, path.stem.removesuffix(naming.suffix)) in stems
    }
    if earlier:
        made.notes.append(
            f"results of an earlier run, not images to upscale: {_some([p.name for p in sorted(earlier)])}"
        )
    return [path for path in images if path not in earlier]


def _outline(path: Path) -> Outline | None:
    """What the header says; None where it cannot be read, which is said when its turn comes."""
    try:
        return read_outline(path)
    except ValueError:
        return None


def _result_name(path: Path, naming: Naming, outline: Outline | None) -> str:
    """The name of a result in a folder."""
    ending = naming.ending or path.suffix
    kind = FORMATS.get(ending.lower())
    if naming.ending is None and (kind is None or (outline and not _holds(ending, naming, outline))):
        ending = FALLBACK
    return f"{path.stem}{naming.suffix}{ending}"


def _holds(ending: str, naming: Naming, outline: Outline) -> bool:
    kind = FORMATS[ending.lower()]
    return (kind.deep or not outline.deep) and (kind.alpha or not (outline.alpha and naming.has_alpha))


def _refuse_loss(job: Job, naming: Naming, outline: Outline | None) -> None:
    """ValueError where the result's format cannot hold what the image's header says."""
    check_target(job.target)
    if outline is None:
        return
    refuse_what_it_cannot_hold(job.target, outline.deep, False)
    try:
        refuse_what_it_cannot_hold(job.target, False, outline.alpha and naming.has_alpha)
    except ValueError as error:
        raise ValueError(f"{error}, or --alpha drop") from error


def _refuse_name(target: Path) -> None:
    """ValueError for a name that the file system has no room for."""
    folder = _existing(target)
    try:
        limit = os.pathconf(folder, "PC_NAME_MAX")
    except OSError:
        limit = LARGEST_NAME_BYTES
    if len(os.fsencode(target.name)) > limit:
        raise ValueError(f"{target.name} has more than the {limit} bytes that a name may have: choose a shorter one")


def _refuse_folder(target: Path) -> None:
    if target.is_dir():
        raise ValueError(f"{target} is a folder: it cannot become an image")


def _existing(target: Path) -> Path:
    """The nearest folder above that is there."""
    return next((folder for folder in target.parents if folder.is_dir()), Path())


def refuse_below_a_file(target: Path) -> None:
    """ValueError where a folder that the target needs is a file."""
    for folder in target.parents:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{target} cannot be written: {folder} is a file, no folder")


def _refuse_unwritable(target: Path) -> None:
    """ValueError where nothing can be written at the target: below a file, or where one may not write."""
    refuse_below_a_file(target)
    folder = target if target.is_dir() else _existing(target)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{target} cannot be written: {folder} is read-only, or not yours: name another place")


def _refuse_overwriting(jobs: Sequence[Job], target: str) -> None:
    """ValueError where a result would take the place of an image, or of another result."""
    sources = {os.path.realpath(job.source): job.source for job in jobs}
    for job in jobs:
        if (there := sources.get(os.path.realpath(job.target))) is not None:
            raise ValueError(f"{target} would overwrite {there}: name another place for the result, or give --suffix")
    counts = Counter(job.target for job in jobs)
    if doubled := [name for name, count in counts.items() if count > 1]:
        both = [job.source.name for job in jobs if job.target == doubled[0]]
        more = f" (and {len(doubled) - 1} more such names)" if len(doubled) > 1 else ""
        raise ValueError(
            f"{' and '.join(both)} would all become {doubled[0]}{more}: rename them, or choose another --format"
        )


def refuse_quality(jobs: Sequence[Job], wanted: Wanted) -> None:
    """ValueError where a quality is asked for that no result has."""
    endings = {job.target.suffix.lower() for job in jobs}
    if wanted.quality is not None and endings and not any(FORMATS[ending].lossy for ending in endings):
        raise ValueError(
            f"--quality is for JPEG and WebP, and results end in {', '.join(sorted(endings))}: leave it out"
        )


def _is_below(path: Path, target: Path, source: Path) -> bool:
    """Whether an image lies in a target folder inside the source: the result of an earlier run."""
    inside = target.resolve() != source.resolve()
    return inside and path.resolve().is_relative_to(target.resolve())


def without_finished(jobs: Sequence[Job], wanted: Wanted, scale: int) -> tuple[list[Job], list[str]]:
    """The jobs whose results are not there, and what is to be said of the others.

    A result is complete, since it appears only then. It is made anew where it is older than its image, or of another
    size than it would have now. By which weights it was made cannot be told.
    """
    left, renewed = [], []
    for job in jobs:
        if not job.target.is_file():
            left.append(job)
        elif not _is_finished(job, wanted, scale):
            left.append(job)
            renewed.append(job.target.name)
    notes = [f"{len(jobs) - len(left)} of {len(jobs)} are there already, and skipped"]
    if renewed:
        notes.append(f"older than their images, or of another size, and so made anew: {_some(renewed)}")
    return left, notes


def _is_finished(job: Job, wanted: Wanted, scale: int) -> bool:
    image, result = _outline(job.source), _outline(job.target)
    if image is None or result is None or job.target.stat().st_mtime_ns < job.source.stat().st_mtime_ns:
        return False
    height, width = image.size
    return result.size in (wanted.size((height, width), scale), wanted.size((width, height), scale))  # turned by EXIF


def _some(names: Sequence[str]) -> str:
    """How many, and the first of them."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)} ({', '.join(names[:NAMED])}{more})"
