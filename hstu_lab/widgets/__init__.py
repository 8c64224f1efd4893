"""Every interactive view: a pure function that returns a figure, and an `Explorer` around it. One module a topic.

Milliseconds everywhere. A stage has the same colour in every figure (Okabe and Ito's palette, safe for colour-blind eyes).
"""

from hstu_lab.widgets.base import EDGE, STAGE_COLOURS, STYLE, Explorer, Figure, format_bytes, source_line, stage_colours
from hstu_lab.widgets.cache import (
    POLICY_COLOURS,
    cache_dashboard,
    cache_explorer,
    cost_bars,
    gap_bars,
    hit_ratio_lines,
    lookup_bars,
    lookup_milliseconds,
    over_time,
    trace_explorer,
    trace_map,
)
from hstu_lab.widgets.engine_times import engine_ways, kernel_kind, kernel_times, time_by_kind
from hstu_lab.widgets.engines import (
    EDGE_SETS,
    build_phases,
    cliff_explorer,
    cliff_text,
    int8_ranges,
    padded_length,
    profile_cliff,
)
from hstu_lab.widgets.kernels import (
    TILE_COLOURS,
    UNIT_CLOCKS,
    rates_by_length,
    share_bars,
    tile_explorer,
    tile_kinds,
    tile_map,
    unit_clocks,
)
from hstu_lab.widgets.latency import latency_by_length, latency_explorer, stage_waterfall, strategy_waterfall, time_lengths
from hstu_lab.widgets.layouts import (
    GROUP_COLOURS,
    UNIT_COLOURS,
    bank_explorer,
    bank_map,
    overlap_explorer,
    overlap_map,
    owner_map,
    schedule,
    step_waterfall,
    tensor_share,
)
from hstu_lab.widgets.load import OUTCOMES, load_curve, load_explorer, outcome_rates
from hstu_lab.widgets.model import attention_explorer, attention_weights, matrices, quality_bars
from hstu_lab.widgets.paging import (
    ACTIVITIES,
    Frame,
    block_map,
    paging_explorer,
    request_colour,
    schedule_explorer,
    scheduler_timeline,
    watch,
)
from hstu_lab.widgets.roofline import BOUND_COLOURS, against, prediction_bars, roofline_explorer, roofline_plot, wave_plot
from hstu_lab.widgets.serving import (
    DECODE,
    EMPTY,
    PREFILL,
    WAITING,
    kv_blocks,
    kv_explorer,
    kv_pool,
    prefix_reuse,
    replica_table,
    serving_steps,
)
from hstu_lab.widgets.tables import PART_COLOURS, parameter_bars, parameter_explorer, parameter_parts, taste_drift
