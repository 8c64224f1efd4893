"""A seeded synthetic world: structured enough that learning shows, made up enough to be shipped.

Items are episodes of series; a series has one creator, a creator keeps mostly to one category; popularity follows Zipf's law.
Users like some categories and creators more than others, and their tastes drift from session to session. What a user meets
next is one of three things:

- the next episode of a series that the user follows, that is, reacted to two events ago or more: finding it takes the
  history and the actions in it, the last item alone says nothing;
- something from the session's category, popular items and liked creators first;
- something from any category the user likes.

Nobody meets an item twice. How an event ends (the action, the dwell) and whether the user is back within a day depend on how
well item and taste match, so that the task heads have something to learn too.
"""

from __future__ import annotations

import numpy as np

from hstu_lab.config import ACTIONS, ModelConfig
from hstu_lab.event_log import Catalog, EventLog, EventsError, Report

START = 1_704_067_200
"""Unix seconds of the world's first day, 2024-01-01 UTC."""
POPULARITY = 1.2
"""Exponent of Zipf's law over series."""
TASTE_DIM = 8
DRIFT = 0.96
"""Correlation of a user's tastes in one session with those in the next."""
MOST_CATEGORIES = 500
FOLLOWED = 4
"""Series that a user follows at a time; a new one displaces the one not seen for longest."""
PROPOSALS = 12
SESSION_EVENTS = 8
"""Events of a session on average."""
DEVICES = ({"device": "phone"}, {"device": "laptop"}, {"device": "tv"})
HOURS = np.array([2, 1, 1, 1, 1, 2, 4, 6, 6, 5, 4, 5, 7, 7, 5, 4, 5, 6, 8, 10, 12, 11, 8, 4], dtype=float)
"""Daily cycle: how likely a session starts in each hour UTC."""

THEMES = {
    "Kitchen": "Broth Bread Curry Noodles",
    "Garden": "Roses Tomatoes Hedges Ponds",
    "Trails": "Ridges Huts Passes Valleys",
    "Trains": "Junctions Night-Lines Viaducts Sleepers",
    "Cycling": "Climbs Gravel Sprints Wheels",
    "Chess": "Gambits Endgames Openings Blunders",
    "History": "Empires Letters Ruins Harbours",
    "Space": "Comets Moons Probes Nebulae",
    "Ocean": "Reefs Tides Whales Currents",
    "Jazz": "Standards Solos Ballads Sessions",
    "Opera": "Arias Rehearsals Duets Overtures",
    "Guitar": "Riffs Chords Repairs Strings",
    "Drawing": "Portraits Inks Sketches Shadows",
    "Pottery": "Glazes Bowls Kilns Handles",
    "Knitting": "Socks Cables Sweaters Yarns",
    "Woodwork": "Joints Chairs Planes Benches",
    "Robots": "Grippers Sensors Walkers Swarms",
    "Coding": "Parsers Bugs Kernels Proofs",
    "Maths": "Primes Knots Graphs Limits",
    "Physics": "Lasers Magnets Waves Orbits",
    "Biology": "Mosses Owls Beetles Spores",
    "Medicine": "Hearts Nerves Vaccines Bones",
    "Running": "Marathons Tracks Hills Intervals",
    "Climbing": "Slabs Cracks Boulders Ropes",
    "Sailing": "Knots Regattas Islands Storms",
    "Football": "Derbies Keepers Tactics Legends",
    "Theatre": "Masks Farces Monologues Curtains",
    "Cinema": "Westerns Shorts Silents Remakes",
    "Poetry": "Sonnets Haiku Odes Elegies",
    "Travel": "Markets Islands Ferries Borders",
    "Design": "Posters Chairs Typefaces Lamps",
    "Money": "Budgets Bonds Bubbles Taxes",
}
NAMES = "Nova Milo Ada Juno Otis Vera Hugo Iris Luca Nina Omar Pia Remy Sana Theo Uma Wim Yara Zeno Bela Cleo Dara Enzo Faye"
MOODS = "Slow Bright Hidden Small Late Wild Quiet Golden Broken First Winter Honest Distant Simple Northern Strange"


class World:
    """Items and tastes that fit the tables of `config`; `seed` fixes them.

    catalog: items "i1", "i2", ... with titles and the features `category` and `creator`. The arrays series, episode and
    next_row (the row of the series' next episode, 0: none) are indexed by catalog row. Raises EventsError where the config
    leaves room for fewer than 8 items.
    """

    def __init__(self, config: ModelConfig, seed: int = 0):
        n = config.num_items - 1
        if n < 8:
            raise EventsError(f"a world needs 8 items or more, preset {config.preset!r} has rows for {n}: raise num_items")
        self.config, self.seed = config, seed
        rng = np.random.default_rng([seed, 1])
        rows = dict(config.side_features)
        lengths = _series_lengths(n, rng)
        num_series = len(lengths)
        num_categories = int(np.clip(min(n // 8, MOST_CATEGORIES), 1, max(rows.get("category", 33) - 1, 1)))
        num_creators = int(np.clip(num_series, 1, max(rows.get("creator", 257) - 1, 1)))

        home = rng.integers(num_categories, size=num_creators)
        second = rng.integers(num_categories, size=num_creators)
        busy = 1 / (1 + np.arange(num_creators)) ** 0.5
        series_creator = np.concatenate(
            [np.arange(num_creators), rng.choice(num_creators, num_series - num_creators, p=busy / busy.sum())]
        )
        series_category = np.where(rng.random(num_series) < 0.85, home[series_creator], second[series_creator])
        series_weight = (1.0 + rng.permutation(num_series)) ** -POPULARITY

        # Rows are shuffled: neighbours in the table have nothing to do with each other.
        row = 1 + rng.permutation(n)
        self.series = np.full(n + 1, -1)
        self.episode, self.next_row = np.zeros((2, n + 1), dtype=np.int64)
        self.series[row] = np.repeat(np.arange(num_series), lengths)
        starts = np.cumsum(lengths) - lengths
        self.episode[row] = 1 + np.arange(n) - np.repeat(starts, lengths)
        follows = self.series[row[1:]] == self.series[row[:-1]]
        self.next_row[row[:-1]] = np.where(follows, row[1:], 0)

        self.category, self.creator = series_category[self.series], series_creator[self.series]
        self.weight = series_weight[self.series] * 0.8 ** (self.episode - 1)
        self.weight[0] = 0
        self.creator_taste = rng.normal(size=(num_creators, TASTE_DIM)) / TASTE_DIM**0.5
        self.quality = 0.4 * rng.normal(size=num_series)[self.series]
        self.price = np.where(rng.random(num_series) < 0.3, 0.5, 0.02)[self.series]
        self.seconds = np.exp(rng.normal(4.6, 0.5, size=num_series))[self.series]
        self.catalog = self._catalog(rows, home, series_creator, rng)

    def _catalog(self, rows: dict[str, int], home: np.ndarray, series_creator: np.ndarray, rng: np.random.Generator) -> Catalog:
        n, num_series = len(self.series), len(series_creator)
        features = {"category": self.category + 1, "creator": self.creator + 1}
        for name, count in rows.items():
            if name not in features:
                features[name] = 1 + rng.integers(max(count - 1, 1), size=num_series)[self.series]
        for name, values in features.items():
            values[0] = 0
            np.minimum(values, rows.get(name, n) - 1, out=values)

        names, moods, themes = NAMES.split(), MOODS.split(), list(THEMES.items())
        studios = []
        for creator, (category, nth) in enumerate(zip(home, _occurrence(home))):
            studio = f"{names[(5 * category + nth) % len(names)]} {themes[category % len(themes)][0]}"
            studios.append(studio if nth < len(names) and category < len(themes) else f"{studio} {creator}")
        mood = (series_creator + _occurrence(series_creator)) % len(moods)
        titles: list[str | None] = [None]
        for creator, category, series, episode in zip(self.creator[1:], self.category[1:], self.series[1:], self.episode[1:]):
            noun = themes[category % len(themes)][1].split()[series % 4].replace("-", " ")
            titles.append(f"{studios[creator]}: {moods[mood[series]]} {noun} #{episode}")
        name = f"synthetic-{self.config.preset}" + (f"-seed{self.seed}" if self.seed else "")
        return Catalog(name, [None, *(f"i{row}" for row in range(1, n))], titles, features)

    def generate(self, num_users: int | None = None, seed: int = 0, events_per_user: int = 150, days: float = 30.0) -> EventLog:
        """Histories of the users "u1" to "u<num_users>" (default: as many as the config has rows for, else 1,000).

        A user has 2/3 to 4/3 of `events_per_user` events, spread over roughly `days` days. The same arguments give the same
        log. Raises EventsError where the users outgrow the config's table or the items would run out.
        """
        room = self.config.num_users - 1
        num_users = (room if room > 0 else 1000) if num_users is None else num_users
        if num_users < 1 or 0 <= room < num_users:
            raise EventsError(f"{num_users:,} users asked for, the preset has rows for {room:,}: ask for fewer")
        if not 1 <= events_per_user * 4 / 3 <= 0.75 * (len(self.series) - 1):
            raise EventsError(
                f"{events_per_user} events a user asked for: give 1 or more, and few enough for {len(self.series) - 1:,} items, "
                "which nobody meets twice"
            )
        walk = _Walk(self, num_users, np.random.default_rng([self.seed, seed, 2]), events_per_user, days)
        low, high = (2 * events_per_user + 2) // 3, 4 * events_per_user // 3
        counts = walk.rng.integers(low, high + 1, size=num_users)
        steps = [walk.step(t) for t in range(counts.max())]
        inside = np.arange(counts.max()) < counts[:, None]
        items, actions, timestamps, dwell, sessions, device = (np.stack(column, axis=1)[inside] for column in zip(*steps))
        offsets = np.concatenate([[0], np.cumsum(counts)])
        return EventLog(
            self.catalog, [f"u{i}" for i in range(1, num_users + 1)], offsets, items, actions, timestamps,
            dwell.astype(np.float32), sessions, np.array(DEVICES, dtype=object)[device],
            Report(f"world {self.catalog.name}", len(items), len(items)),
        )  # fmt: skip


class _Walk:
    """All users of a world, one event at a time; every array has the users as its first axis."""

    def __init__(self, world: World, num_users: int, rng: np.random.Generator, events_per_user: int, days: float):
        self.world, self.rng = world, rng
        self.gap = days * 86400 * SESSION_EVENTS / events_per_user
        num_categories = world.category[1:].max() + 1
        self.users = np.arange(num_users)
        self.taste = rng.normal(size=(num_users, num_categories))
        self.creator_taste = 1.5 * rng.normal(size=(num_users, TASTE_DIM))
        self.seen = np.zeros((num_users, len(world.series)), dtype=bool)
        self.seen[:, 0] = True
        self.next_episode = np.zeros((num_users, FOLLOWED), dtype=np.int64)
        self.touched = np.full((num_users, FOLLOWED), -1000)
        self.left = np.zeros(num_users, dtype=np.int64)
        self.session = np.full(num_users, -1)
        self.mood = np.full(num_users, 0.5)
        self.device = np.zeros(num_users, dtype=np.int64)
        self.focus = np.zeros(num_users, dtype=np.int64)
        self.time = START + rng.integers(int(0.2 * days * 86400) + 1, size=num_users)
        # Items sorted by category, and a running sum of their weights, to draw popular ones of a category.
        self.by_category = 1 + np.argsort(world.category[1:], kind="stable")
        self.cumulative = np.concatenate([[0], np.cumsum(world.weight[self.by_category])])
        self.bounds = np.searchsorted(world.category[self.by_category], np.arange(num_categories + 1))

    def step(self, t: int) -> tuple[np.ndarray, ...]:
        """One more event of every user: item, action, timestamp, dwell, session, device, each (users,)."""
        world, rng = self.world, self.rng
        self._start_sessions(self.left == 0)
        item, match, following = self._choose(t)
        strength = match + 0.5 * following + 0.7 * rng.normal(size=len(item))
        action = np.searchsorted([-0.1, 0.3, 1.2, 1.9], strength)
        action = np.array([ACTIONS.index(name) for name in ("impression", "dwell", "click", "like", "share")])[action]
        bought = rng.random(len(item)) < world.price[item] / (1 + np.exp(-2 * (strength - 0.8)))
        action[bought] = ACTIONS.index("purchase")
        looked = world.seconds[item] / (1 + np.exp(-1.5 * strength)) * np.exp(0.3 * rng.normal(size=len(item)))
        glanced = action == ACTIONS.index("impression")
        dwell = np.round(np.where(glanced, 1 + 0.1 * looked, np.maximum(looked, 8)), 1)
        pleased = strength > 0.3
        self._follow(item, t, pleased)
        self.seen[self.users, item] = True
        self.mood = 0.7 * self.mood + 0.3 * pleased
        event = item, action, self.time.copy(), dwell, self.session.copy(), self.device.copy()
        self.time += np.rint(dwell + 2 + rng.exponential(15, size=len(item))).astype(np.int64)
        self.left -= 1
        return event

    def _start_sessions(self, starting: np.ndarray) -> None:
        rng, n = self.rng, int(starting.sum())
        if not n:
            return
        mean = self.gap * np.exp(0.6 - 2.0 * self.mood[starting])
        gaps = 2 * 3600 + rng.exponential(size=(n, 8)) * mean[:, None]
        hours = ((self.time[starting, None] + gaps) // 3600 % 24).astype(np.int64)
        self.time[starting] += np.rint(_choose_one(np.log(HOURS)[hours], gaps, rng)).astype(np.int64)
        self.left[starting] = 1 + rng.geometric(1 / (SESSION_EVENTS - 1), size=n)
        self.session[starting] += 1
        self.device[starting] = rng.choice(len(DEVICES), p=[0.6, 0.25, 0.15], size=n)
        news = (1 - DRIFT**2) ** 0.5 * rng.normal(size=(n, self.taste.shape[1]))
        self.taste[starting] = DRIFT * self.taste[starting] + news
        categories = np.broadcast_to(np.arange(self.taste.shape[1]), (n, self.taste.shape[1]))
        self.focus[starting] = _choose_one(2.0 * self.taste[starting], categories, rng)

    def _choose(self, t: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The next item, how well it matches the user's taste, and whether it continues a series that the user follows."""
        world, rng = self.world, self.rng
        open_series = ~np.take_along_axis(self.seen, self.next_episode, 1) & (t - self.touched > 1)
        recency = np.where(open_series, -0.04 * (t - self.touched), -np.inf)
        following = (rng.random(len(self.users)) < 0.5) & open_series.any(1)
        episode = _choose_one(np.where(open_series.any(1)[:, None], recency, 0), self.next_episode, rng)

        categories = np.broadcast_to(np.arange(self.taste.shape[1]), self.taste.shape)
        category = np.where(rng.random(len(self.users)) < 0.6, self.focus, _choose_one(2.0 * self.taste, categories, rng))
        low, high = self.cumulative[self.bounds[category]], self.cumulative[self.bounds[category + 1]]
        draws = low[:, None] + (high - low)[:, None] * rng.random((len(low), PROPOSALS))
        proposed = self.by_category[np.searchsorted(self.cumulative, draws, side="right").clip(1, len(self.by_category)) - 1]
        fresh = ~np.take_along_axis(self.seen, proposed, 1)
        liking = (self.creator_taste[:, None] * world.creator_taste[world.creator[proposed]]).sum(-1)
        item = _choose_one(np.where(fresh, 1.5 * liking, -1e9), proposed, rng)
        item = np.where(following, episode, item)
        stale = np.flatnonzero(self.seen[self.users, item])
        if len(stale):  # the category is used up: anything new, popular first
            keys = np.log(world.weight[1:]) + rng.gumbel(size=(len(stale), len(world.weight) - 1))
            item[stale] = 1 + np.where(self.seen[stale, 1:], -np.inf, keys).argmax(1)
        liking = (self.creator_taste * world.creator_taste[world.creator[item]]).sum(-1)
        match = 0.4 * self.taste[self.users, world.category[item]] + 0.4 * liking + world.quality[item] - 1.1
        return item, match, following

    def _follow(self, item: np.ndarray, t: int, pleased: np.ndarray) -> None:
        """Remember the next episode of a series that pleased; forget a series that did not."""
        world = self.world
        known = (world.series[self.next_episode] == world.series[item][:, None]) & (self.next_episode > 0)
        known |= self.next_episode == item[:, None]
        slot = np.where(known.any(1), known.argmax(1), self.touched.argmin(1))
        keep = pleased & (world.next_row[item] > 0)
        change = keep | known.any(1)
        self.next_episode[self.users[change], slot[change]] = np.where(keep, world.next_row[item], 0)[change]
        self.touched[self.users[change], slot[change]] = np.where(keep, t, -1000)[change]


def _choose_one(logits: np.ndarray, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One value of each row, drawn with softmax(logits): the Gumbel-max trick. logits, values (n, m) -> (n,)."""
    best = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    return np.take_along_axis(values, best[:, None], 1)[:, 0]


def _occurrence(values: np.ndarray) -> np.ndarray:
    """How many equal values stand before each one."""
    order = np.argsort(values, kind="stable")
    starts = np.searchsorted(values[order], values[order], side="left")
    nth = np.empty(len(values), dtype=np.int64)
    nth[order] = np.arange(len(values)) - starts
    return nth


def _series_lengths(total: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths of 3 to 9 episodes that add up to `total`; the last series may be shorter."""
    lengths = rng.integers(3, 10, size=total // 3 + 1)
    ends = np.cumsum(lengths)
    last = int(np.searchsorted(ends, total))
    lengths = lengths[: last + 1].copy()
    lengths[last] -= ends[last] - total
    return lengths
