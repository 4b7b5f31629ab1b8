"""How Pathfinder's contours grow: thousands of attempts side by side in numpy arrays.

A contour is a row of segments, each a stamp: a line, and a mask of the room that it claims. Nearly all of the time goes
into pairs of contours that end in a dead end, so those attempts run in one pool: every step extends each of them by one
segment, and what dies makes room for the next attempt. An attempt draws from a stream of its own, keyed by the image and
the attempt's number, and an image takes its lowest-numbered attempt that succeeds. As all successes take the same number
of steps, the width of the pool changes nothing.

Coordinates are (row, column). Frames are images with a rim of `Tables.rim` pixels, as wide as a stamp reaches, so that no
stamp needs clipping; masks are flattened frames of uint8, 255 = claimed. A placed segment is (row, column, direction):
where its stamp lies, and which stamp it is.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

POOL_BYTES = 4 * 2**20  # of masks in a pool: more falls out of the caches
SEED_DIRECTIONS = 360
SEED_TRIES = EXTENSION_TRIES = 3
DISTRACTOR_TRIES = 5
CROSSING = 459  # mask and stamp may add up to less than 1.8 x 255
FREE = 76  # a pixel is free up to 0.3 x 255
LEAST_FREE = 0.01  # no distractor is begun with less of the image free
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def mix(keys: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, a bijection that leaves no pattern: the finaliser of SplitMix64."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


def image_keys(seed: int, indices: np.ndarray) -> np.ndarray:
    """One key per image: a function of the seed and the image's index alone. uint64 [B]."""
    return mix(mix(np.full(1, seed, np.uint64)) + np.asarray(indices, np.uint64) * _GAMMA)


class Streams:
    """Independent streams of uniform numbers in [0, 1), SplitMix64, one per key (Steele, Lea and Flood, OOPSLA 2014)."""

    def __init__(self, keys: np.ndarray):
        self.states = mix(keys)

    def uniform(self, rows=slice(None)) -> np.ndarray:
        """The next number of the streams `rows`, each named at most once. float64 [len(rows)]."""
        self.states[rows] += _GAMMA
        return (mix(self.states[rows]) >> np.uint64(11)) * 2.0**-53


class Tables(NamedTuple):
    """What depends on the configuration and the gap alone. D directions: 360 of seeds, in whole degrees from -180, then
    one for each of the C candidates of an extension. Lists of unequal length are filled up with their first entry."""

    size: int
    rim: int  # K of the stamps' (2K+1)-squares, and the frame's rim
    width: int  # of a frame
    blank: np.ndarray  # uint8 [width^2], the mask to start with: the padding is claimed
    lines: np.ndarray  # uint8 [D, 2K+1, 2K+1]
    masks: np.ndarray  # uint8 [D, 2K+1, 2K+1]
    claims: np.ndarray  # int32 [D, U]: where a mask stamp is not 0, relative to its place in a frame
    claimed: np.ndarray  # uint8 [D, U]: and what it is there
    touches: np.ndarray  # int32 [D, V]: where a mask stamp could add up to a crossing
    limits: np.ndarray  # uint8 [D, V]: from where on it does
    disc: np.ndarray  # int32 [E]: the disc of the gap's radius
    candidates: np.ndarray  # int [C, 2]: from the pivot
    choices: np.ndarray  # int [D, M]: candidates of a turn that is not too sharp
    weights: np.ndarray  # float64 [D, M]: cos^2, 0 for what only fills up
    advance: np.ndarray  # int [D, 2]: from a pivot to the next
    reach: np.ndarray  # int [360, 2]: from a seed's start to its head
    back: np.ndarray  # int [C, 2]: from the far end of an extension to its near one
    retreat: np.ndarray  # int [360, 2]: and from there to its pivot
    footprints: tuple[np.ndarray, ...]  # 360 of int [*, 2]: what must be free around a start
    seedable: np.ndarray  # bool [360]: the directions that seeding works for
    orbit: np.ndarray  # float64 [360, 2]: from the first seed to the second
    seeds: np.ndarray  # the directions that a first contour can begin in
    starts: np.ndarray  # int [*, 2]: starts of a first contour, those of seeds[0] first
    begins: np.ndarray  # int [len(seeds) + 1]: where in `starts` those of a direction begin


def _displacement(angle: float, length: float) -> tuple[int, int]:
    """A step on the pixel grid, both coordinates rounded up."""
    base = 64  # swallows errors in the last digits, which rounding up would blow up to a pixel
    return math.ceil(base + length * math.sin(angle)) - base, math.ceil(base + length * math.cos(angle)) - base


def _disc(radius: int) -> np.ndarray:
    rows, columns = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return np.argwhere(rows**2 + columns**2 <= radius**2) - radius


def stamps(angle: float, length: int, thickness: float, gap: int, antialias: int) -> tuple[np.ndarray, np.ndarray]:
    """A segment from the centre at an angle (radians): its line and its mask, uint8 [2K+1, 2K+1]."""
    from PIL import Image, ImageDraw  # here, so that a catalogue of data sets needs no Pillow

    reach = length + math.ceil(thickness) + gap
    centre, side = reach * antialias, 2 * reach * antialias + 1
    row, column = _displacement(angle, length * antialias)
    line = Image.new("L", (side, side))
    ends = [(centre, centre), (centre + column, centre + row)]
    ImageDraw.Draw(line).line(ends, fill=255, width=round(thickness * antialias))
    mask = np.zeros((side, side), np.uint8)
    drawn = np.argwhere(np.asarray(line))[:, None] + _disc(gap * antialias)
    mask[drawn[..., 0], drawn[..., 1]] = 255
    small = (2 * reach + 1, 2 * reach + 1)
    shrunk = [image.resize(small, Image.Resampling.LANCZOS) for image in (line, Image.fromarray(mask))]
    return np.asarray(shrunk[0]), np.asarray(shrunk[1])


def _ragged(rows: list[np.ndarray]) -> np.ndarray:
    longest = max(map(len, rows))
    return np.stack([np.concatenate([row, np.repeat(row[:1], longest - len(row), 0)]) for row in rows])


@functools.lru_cache(maxsize=32)
def tables(config, gap: int) -> Tables:
    """The tables of a `pictures.Config`, for one of its gaps."""
    size, length, radius = config.size, config.segment_length, config.segment_length + gap
    rim = length + math.ceil(config.thickness) + gap
    width = size + 2 * rim
    circle = np.arange(0, 360, 360 / (2 * math.pi * radius)) * math.pi / 180
    candidates = np.unique(np.floor(radius * np.stack([np.sin(circle), np.cos(circle)], 1)).astype(int), axis=0)
    ahead = np.array([math.radians(degree - 180) for degree in range(SEED_DIRECTIONS)])
    onward = np.array([math.atan2(row, column) for row, column in candidates])
    directions = np.concatenate([ahead, onward])
    drawn = np.concatenate([ahead, onward + math.pi])  # an extension is drawn from its far end back
    pairs = [stamps(angle, length, config.thickness, gap, config.antialias) for angle in drawn]
    lines, masks = (np.stack(kind) for kind in zip(*pairs, strict=True))

    def places(which):
        at = [np.argwhere(one) - rim for one in which]
        return _ragged([(place[:, 0] * width + place[:, 1]).astype(np.int32) for place in at])

    choices, weights = _turns(onward, directions, config.continuity)
    blank = _blank(size, rim, config.padding)
    footprints = tuple(_footprint(mask, rim, radius) for mask in masks[:SEED_DIRECTIONS])
    moves = lambda angles, distance: np.array([_displacement(angle, distance) for angle in angles])
    reach, retreat = moves(ahead, length), moves(ahead + math.pi, radius)
    seedable = np.array([config.all_directions or _surrounds(footprint) for footprint in footprints])
    taken = blank.reshape(width, width)[rim : rim + size, rim : rim + size] > FREE
    starts = _starts(taken | _border(size, 2 * config.seed_distance), footprints, seedable, reach, retreat)
    crossing = [(CROSSING - mask[mask >= CROSSING - 255].astype(int)).astype(np.uint8) for mask in masks]
    return Tables(
        size=size, rim=rim, width=width, blank=blank, lines=lines, masks=masks, claims=places(masks > 0),
        claimed=_ragged([mask[mask > 0] for mask in masks]), touches=places(masks >= CROSSING - 255),
        limits=_ragged(crossing), disc=(_disc(gap) @ [width, 1]).astype(np.int32), candidates=candidates, choices=choices,
        weights=weights, advance=moves(directions, length + 2 * gap), reach=reach, back=moves(onward + math.pi, length),
        retreat=retreat, footprints=footprints, seedable=seedable,
        orbit=config.seed_distance * np.array([(math.sin(angle), math.cos(angle)) for angle in ahead]),
        seeds=np.array(list(starts)), starts=np.concatenate(list(starts.values())),
        begins=np.cumsum([0, *map(len, starts.values())]),
    )  # fmt: skip


def _turns(onward: np.ndarray, directions: np.ndarray, continuity: float) -> tuple[np.ndarray, np.ndarray]:
    """Of each direction the extensions that may follow it, and their weights: cos^2 of the turn, 0 in what fills a row."""
    turn = np.abs(onward - directions[:, None])
    turn = np.minimum(np.minimum(turn, 2 * math.pi - turn) * continuity, math.pi / 2)
    weights = np.cos(turn) ** 2
    likely = [np.flatnonzero(row > 1e-12) for row in weights]
    filled = np.arange(max(map(len, likely))) < np.array([len(row) for row in likely])[:, None]
    choices = _ragged(likely)
    return choices, np.take_along_axis(weights, choices, 1) * filled


def _blank(size: int, rim: int, padding: int) -> np.ndarray:
    """A picture with a rim around it, in which all but what is nearer than `padding` to its edges is free: flat, uint8."""
    blank = np.zeros((size + 2 * rim,) * 2, np.uint8)
    blank[rim : rim + size, rim : rim + size] = 255
    inside = slice(rim + padding, rim + size - padding)
    blank[inside, inside] = 0
    return blank.ravel()


def _footprint(mask: np.ndarray, rim: int, radius: int) -> np.ndarray:
    """The mask stamp drawn one pixel right and down of the centre of a (2(L+g)+1)-square, and cut to it."""
    full = np.argwhere(mask == 255) - rim + 1
    return full[(np.abs(full) <= radius).all(axis=1)]


def _border(size: int, distance: int) -> np.ndarray:
    """What is nearer than `distance` to an edge."""
    border = np.ones((size, size), bool)
    border[distance : size - distance, distance : size - distance] = False
    return border


def _starts(taken: np.ndarray, footprints, seedable, reach, retreat) -> dict[int, np.ndarray]:
    """By direction, where a first segment may start: its footprint is free, and both its ends are inside; nowhere: no entry."""
    starts = {}
    for direction in np.flatnonzero(seedable):
        free = np.argwhere(available(taken, footprints[direction]))
        head = free + reach[direction]
        free = free[_within(head, len(taken)) & _within(head + retreat[direction], len(taken))]
        if len(free):
            starts[direction] = free
    return starts


def _surrounds(footprint: np.ndarray) -> bool:
    """Whether a footprint has a pixel in each of the four closed quadrants.

    The original takes a maximum over the footprint that is minus infinity where all of it falls outside the image, which
    can only happen in a corner, and then takes the whole direction for full. So seeding works where it never happens.
    """
    return all(((footprint * signs) >= 0).all(axis=1).any() for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1)))


def _within(places: np.ndarray, size: int) -> np.ndarray:
    return ((places >= 0) & (places < size)).all(axis=-1)


def available(occupied: np.ndarray, footprint: np.ndarray) -> np.ndarray:
    """Where a footprint lies on free pixels alone; the outside is occupied. bool [S, S] -> bool [S, S]."""
    size, margin = len(occupied), int(np.abs(footprint).max(initial=0))
    frame = np.ones((size + 2 * margin, size + 2 * margin), bool)
    frame[margin : margin + size, margin : margin + size] = occupied
    blocked = np.zeros_like(occupied)
    for row, column in footprint + margin:
        blocked |= frame[row : row + size, column : column + size]
    return ~blocked


def _claim(table: Tables, masks: np.ndarray, offsets: np.ndarray, places: np.ndarray) -> None:
    """Adds the mask stamps of placed segments [n, 3] to masks that begin at `offsets` [n] of a flat array."""
    at = offsets + (places[:, 0] + table.rim) * table.width + places[:, 1] + table.rim
    at = at[:, None] + table.claims[places[:, 2]]
    masks[at] = np.maximum(masks[at], table.claimed[places[:, 2]])


def _extend(table: Tables, masks, offsets, pivots, directions, streams, rows):
    """Tries to add one segment to each of n contours.

    Args:
        masks: uint8, flat; that of contour i begins at offsets[i].
        pivots, directions: [n, 2], [n], of the last segments.
        streams, rows: where contour i draws from: streams.uniform(rows[i]).
    Returns: whether it went [n]; the new segments [n, 3] and pivots [n, 2], of no meaning where it did not.
    """
    count = len(directions)
    pivots = pivots + table.advance[directions]
    choices, weights = table.choices[directions], table.weights[directions]
    rows_, columns = (pivots[:, axis, None] + table.candidates[choices, axis] for axis in (0, 1))
    inside = (rows_ >= 0) & (rows_ < table.size) & (columns >= 0) & (columns < table.size)
    at = np.where(inside, rows_ * table.width + columns, 0) + (offsets + table.rim * (table.width + 1))[:, None]
    taken = masks[at + table.disc[0]]
    for offset in table.disc[1:]:
        np.maximum(taken, masks[at + offset], out=taken)
    sums = np.cumsum(weights * inside * (255.0 - taken), axis=1)
    ok = np.zeros(count, bool)
    picks = np.zeros(count, int)
    pending = np.flatnonzero(sums[:, -1] >= 255e-4)
    for _ in range(EXTENSION_TRIES):
        if not len(pending):
            break
        threshold = streams.uniform(rows[pending]) * sums[pending, -1]
        pick = (sums[pending] > threshold[:, None]).argmax(axis=1)
        candidate = choices[pending, pick] + SEED_DIRECTIONS
        touched = masks[at[pending, pick][:, None] + table.touches[candidate]]
        fits = ~(touched >= table.limits[candidate]).any(axis=1)
        picks[pending], ok[pending] = pick, fits
        pending = pending[~fits]
    chosen = choices[np.arange(count), picks]
    segments = np.concatenate([pivots + table.candidates[chosen], chosen[:, None] + SEED_DIRECTIONS], axis=1)
    return ok, segments, pivots


class Pairs(NamedTuple):
    """Two target contours for each of B images: segments int [B, 2, n, 3]; masks uint8 [B, width^2], flattened frames;
    attempts [B], how many it took."""

    segments: np.ndarray
    masks: np.ndarray
    attempts: np.ndarray


def grow_pairs(config, table: Tables, keys: np.ndarray) -> Pairs:
    """Grows the two targets of every image: keys uint64 [B]."""
    count, area, steps = len(keys), table.width**2, 2 * (config.contour_length - 1)
    pool = int(np.clip(POOL_BYTES // area, 64, 2048))
    masks = np.zeros(pool * area, np.uint8)
    by_slot = masks.reshape(pool, area)
    offsets, slots = np.arange(pool) * area, np.arange(pool)
    streams = Streams(np.zeros(pool, np.uint64))
    image, attempt, step = np.zeros(pool, int), np.zeros(pool, int), np.zeros(pool, int)
    pivots = np.zeros((pool, 2, 2), int)
    segments = np.zeros((pool, 2, config.contour_length, 3), int)
    result = Pairs(np.zeros((count, *segments.shape[1:]), int), np.zeros((count, area), np.uint8), np.zeros(count, int))
    unfinished, begun, turn = np.arange(count), np.zeros(count, int), 0
    dead = slots
    while len(unfinished):
        # Attempts of an image begin in the order of their numbers, whichever image's turn it is.
        order = np.arange(len(dead))
        image[dead] = unfinished[(turn + order) % len(unfinished)]
        attempt[dead] = begun[image[dead]] + order // len(unfinished)
        np.add.at(begun, image[dead], 1)
        turn = (turn + len(dead)) % len(unfinished)
        streams.states[dead] = mix(keys[image[dead]] + mix(attempt[dead].astype(np.uint64) + np.uint64(1)))
        started = _seed_pairs(table, streams, dead, pivots, segments)
        by_slot[dead] = table.blank
        step[dead] = 0

        which = step % 2
        last = segments[slots, which, step // 2]
        ok, new, pivots[slots, which] = _extend(table, masks, offsets, pivots[slots, which], last[:, 2], streams, slots)
        ok[dead] &= started
        grown = slots[ok]
        # A contour claims the room of a segment only when the next one stands: it may touch its own last one.
        _claim(table, masks, offsets[grown], last[ok])
        segments[grown, which[ok], step[ok] // 2 + 1] = new[ok]
        step += 1
        ends = slots[ok & (step == steps)]
        if len(ends):
            ends = ends[np.lexsort((attempt[ends], image[ends]))]
            found, first = np.unique(image[ends], return_index=True)
            ends = ends[first]
            _claim(table, masks, offsets[ends], segments[ends, 1, -1])  # the second contour's end only, as published
            result.segments[found], result.masks[found] = segments[ends], by_slot[ends]
            result.attempts[found] = attempt[ends] + 1
            unfinished = np.setdiff1d(unfinished, found, assume_unique=True)
            turn = 0
            ok &= ~np.isin(image, found)
        dead = slots[~ok]
    return result


def _seed_pairs(table: Tables, streams: Streams, rows, pivots, segments) -> np.ndarray:
    """Places the first segments of the attempts `rows`; False where they fall outside."""
    seed = (streams.uniform(rows) * len(table.seeds)).astype(int)
    begin, end = table.begins[seed], table.begins[seed + 1]
    first = table.starts[begin + (streams.uniform(rows) * (end - begin)).astype(int)]
    second = np.rint(first + table.orbit[(streams.uniform(rows) * SEED_DIRECTIONS).astype(int)]).astype(int)
    directions = (table.seeds[seed], (streams.uniform(rows) * SEED_DIRECTIONS).astype(int))
    inside = np.ones(len(rows), bool)
    for contour, (start, direction) in enumerate(zip((first, second), directions, strict=True)):
        head = start + table.reach[direction]
        pivot = head + table.retreat[direction]
        segments[rows, contour, 0] = np.concatenate([start, direction[:, None]], axis=1)
        pivots[rows, contour] = pivot
        inside &= _within(head, table.size) & _within(pivot, table.size)
    return inside


def grow_distractors(config, table: Tables, masks: np.ndarray, streams: Streams) -> list[list[np.ndarray]]:
    """Grows the distractors of B images, one after the other in each, where there is room; one that fails its tries is
    left out. `masks` [B, width^2] are claimed in place. Returns: for every image its contours, int [n, 3] each."""
    count, area = masks.shape
    flat = masks.reshape(-1)
    grown: list[list[np.ndarray]] = [[] for _ in range(count)]
    done, tries = np.zeros(count, int), np.zeros(count, int)
    while (active := np.flatnonzero(done < config.num_distractors)).size:
        seeded = [(image, *seed) for image in active if (seed := _seed(table, masks[image], streams, image))]
        tries[active] += 1
        if seeded:
            images = np.array([image for image, *_ in seeded])
            contours, pivots = (np.array([one[part] for one in seeded]) for part in (1, 2))
            contours, before = contours[:, None], masks[images]
            for _ in range(config.distractor_length - 1):
                last = contours[:, -1]
                ok, new, pivots = _extend(table, flat, images * area, pivots, last[:, 2], streams, images)
                masks[images[~ok]] = before[~ok]
                images, before, pivots, last = images[ok], before[ok], pivots[ok], last[ok]
                _claim(table, flat, images * area, last)
                contours = np.concatenate([contours[ok], new[ok, None]], axis=1)
            _claim(table, flat, images * area, contours[:, -1])
            for image, contour in zip(images, contours, strict=True):
                grown[image].append(contour)
            done[images] += 1
            tries[images] = 0
        given_up = tries == DISTRACTOR_TRIES
        done[given_up] += 1
        tries[given_up] = 0
    return grown


def _seed(table: Tables, mask: np.ndarray, streams: Streams, image: int):
    """The first segment of a distractor and its pivot, or None."""
    row = np.array([image])
    inner = mask.reshape(table.width, table.width)[table.rim : -table.rim, table.rim : -table.rim]
    occupied = inner > FREE
    if occupied.size - occupied.sum() < LEAST_FREE * occupied.size:
        return None
    occupied[[0, -1]] = True
    occupied[:, [0, -1]] = True
    for _ in range(SEED_TRIES):
        direction = int(streams.uniform(row)[0] * SEED_DIRECTIONS)
        if not table.seedable[direction]:
            return None
        free = np.flatnonzero(available(occupied, table.footprints[direction]))
        if not len(free):
            return None
        start = np.array(divmod(int(free[int(streams.uniform(row)[0] * len(free))]), table.size))
        head = start + table.reach[direction]
        pivot = head + table.retreat[direction]
        if _within(head, table.size) and _within(pivot, table.size):
            return np.array([*start, direction]), pivot
    return None
