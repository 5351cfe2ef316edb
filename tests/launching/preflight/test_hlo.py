"""The reader of HLO on small modules written by hand, whose every number is worked out beside them."""

from __future__ import annotations

import textwrap

import pytest

from subl_jax.launching.preflight import counts
from subl_jax.launching.preflight.hlo import HloError, Module

# An outer loop of 5 rounds, told by its condition; in it an inner one of 3, told by the compiler. The inner body gathers 2 x 64
# bytes into 4 x 64 x 4 B = 1024 B, and multiplies [8, 16] by [16, 4].
NESTED = """\
    HloModule nested, is_scheduled=true

    %sum (a: f32[], b: f32[]) -> f32[] {
      %a = f32[] parameter(0)
      %b = f32[] parameter(1)
      ROOT %c = f32[] add(%a, %b)
    }

    %inner_condition (p: (s32[], f32[8,16])) -> pred[] {
      %p = (s32[], f32[8,16]{1,0}) parameter(0)
      %limit.0 = s32[] constant(99)
      %i.0 = s32[] get-tuple-element(%p), index=0
      ROOT %less.0 = pred[] compare(%i.0, %limit.0), direction=LT
    }

    %inner_body (q: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
      %q = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
      %i.1 = s32[] get-tuple-element(%q), index=0
      %x.1 = f32[8,16]{1,0:T(8,128)} get-tuple-element(%q), index=1
      %w = f32[16,4]{1,0} constant({...})
      %y = f32[8,4]{1,0} dot(%x.1, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
      %part = f32[64]{0} constant({...})
      %whole = f32[256]{0} all-gather(%part), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
      %one.1 = s32[] constant(1)
      %next.1 = s32[] add(%i.1, %one.1)
      ROOT %t.1 = (s32[], f32[8,16]) tuple(%next.1, %x.1)
    }

    %counter (r: s32[]) -> s32[] {
      %r = s32[] parameter(0)
      %two = s32[] constant(2)
      ROOT %plus = s32[] add(%r, %two)
    }

    %outer_condition (s: (s32[], f32[8,16])) -> pred[] {
      %s = (s32[], f32[8,16]{1,0}) parameter(0)
      %limit.2 = s32[]{:T(128)} constant(10)
      %i.2 = s32[] get-tuple-element(%s), index=0
      ROOT %less.2 = pred[] compare(%i.2, %limit.2), direction=LT
    }

    %outer_body (u: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
      %u = (s32[], f32[8,16]{1,0}) parameter(0)
      %i.3 = s32[] get-tuple-element(%u), index=0
      %x.3 = f32[8,16]{1,0} get-tuple-element(%u), index=1
      %zero.3 = s32[] constant(0)
      %start.3 = (s32[], f32[8,16]) tuple(%zero.3, %x.3)
      %loop.3 = (s32[], f32[8,16]) while(%start.3), condition=%inner_condition, body=%inner_body, \
    backend_config={"known_trip_count":{"n":"3"}}
      %x.4 = f32[8,16]{1,0} get-tuple-element(%loop.3), index=1
      %summed = f32[8,16]{1,0} all-reduce(%x.4), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%sum
      %next.3 = s32[] fusion(%i.3), kind=kLoop, calls=%counter
      ROOT %t.3 = (s32[], f32[8,16]) tuple(%next.3, %summed)
    }

    ENTRY %main (v: f32[8,16]) -> f32[8,16] {
      %v = f32[8,16]{1,0} parameter(0)
      %zero = s32[] constant(0)
      %start = (s32[], f32[8,16]) tuple(%zero, %v)
      %loop = (s32[], f32[8,16]) while(%start), condition=%outer_condition, body=%outer_body
      ROOT %result = f32[8,16]{1,0} get-tuple-element(%loop), index=1
    }
    """


def module(text: str) -> Module:
    return Module(textwrap.dedent(text))


def entry(body: str, result: str = "f32[8]") -> Module:
    lines = "\n".join(f"  {line.strip()}" for line in body.strip().splitlines())
    return Module(
        f"HloModule one\n\nENTRY %main (p: f32[8]) -> {result} {{\n  %p = f32[8]{{0}} parameter(0)\n{lines}\n}}\n"
    )


def test_nested_loops_multiply_collectives_by_both_trip_counts() -> None:
    found = counts.collectives(module(NESTED), 8)
    assert [(one.kind, one.times, one.group, one.bytes) for one in found] == [
        ("all-gather", 15, 4, 1024),
        ("all-reduce", 5, 2, 8 * 16 * 4),
    ]
    assert sum(one.total for one in found) == 15 * 1024 + 5 * 512


def test_nested_loops_multiply_products_by_both_trip_counts() -> None:
    assert counts.matrix_flops(module(NESTED)) == 15 * 2 * 8 * 16 * 4


def test_a_ring_sends_all_but_its_own_share_and_a_sum_goes_round_twice() -> None:
    gathered, summed = counts.collectives(module(NESTED), 8)
    assert gathered.wire == 15 * 1024 * 3 / 4
    assert summed.wire == 5 * 512 * 2 * 1 / 2


def test_a_loop_whose_limit_is_an_argument_is_of_unknown_length_and_counts_once() -> None:
    text = NESTED.replace("%limit.2 = s32[]{:T(128)} constant(10)", "%limit.2 = s32[] get-tuple-element(%s), index=1")
    read = module(text)
    assert read.unknown_loops() == 1
    assert [(one.times, one.unknown) for one in counts.collectives(read, 8)] == [(3, True), (1, True)]


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", 2),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_0','axis_2'}", 8),
        ("replica_groups={}", 8),
    ],
)
def test_groups_are_read_in_every_form(groups: str, devices: int) -> None:
    read = entry(
        f"ROOT %r = f32[8]{{0}} all-reduce(%p), channel_id=1, {groups}, use_global_device_ids=true, to_apply=%add"
    )
    assert [one.group for one in counts.collectives(read, 8)] == [devices]


def test_an_asynchronous_gather_counts_its_result_once() -> None:
    read = entry(
        """
        %s = (f32[8]{0}, f32[32]{0}) all-gather-start(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
        ROOT %d = f32[32]{0} all-gather-done(%s)
        """
    )
    (one,) = counts.collectives(read, 8)
    assert (one.kind, one.bytes) == ("all-gather", 32 * 4)


def test_a_collective_that_a_chain_of_fusions_names_three_times_is_one() -> None:
    gather = 'replica_groups=[1,8]<=[8], dimensions={0}, frontend_attributes={chain_id="2"}'
    fused = "\n\n".join(
        f"%f{number} (a{number}: f32[8]) -> f32[64] {{\n  %a{number} = f32[8]{{0}} parameter(0)\n"
        f"  ROOT %g{number} = f32[64]{{0}} all-gather(%a{number}), channel_id=7, {gather}\n}}"
        for number in range(3)
    )
    calls = "\n".join(f"  %c{n} = f32[64]{{0}} fusion(%p), kind=kCustom, calls=%f{n}" for n in range(3))
    read = Module(
        f"HloModule chain\n\n{fused}\n\nENTRY %main (p: f32[8]) -> f32[64] {{\n  %p = f32[8]{{0}} parameter(0)\n{calls}\n"
        "  ROOT %r = f32[64]{0} copy(%c2)\n}\n"
    )
    assert [one.total for one in counts.collectives(read, 8)] == [64 * 4]


def test_an_all_reduce_of_which_a_fusion_keeps_a_slice_is_a_reduce_scatter() -> None:
    read = Module(
        textwrap.dedent(
            """\
            HloModule scattered

            %all-reduce-scatter.1 (a: f32[64]) -> f32[8] {
              %a = f32[64]{0} parameter(0)
              %r = f32[64]{0} all-reduce(%a), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
              %z = s32[] constant(0)
              ROOT %s = f32[8]{0} dynamic-slice(%r, %z), dynamic_slice_sizes={8}
            }

            ENTRY %main (p: f32[64]) -> f32[8] {
              %p = f32[64]{0} parameter(0)
              ROOT %f = f32[8]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
            }
            """
        )
    )
    assert [(one.kind, one.bytes) for one in counts.collectives(read, 8)] == [("reduce-scatter", 256)]


def test_a_convolution_counts_only_places_that_are_no_padding() -> None:
    # A batched product [4] x ([8, 16] x [16, 32]) as TPUs write it: one spatial dimension walks over the batch.
    read = entry(
        """
        %l = bf16[4,8,16]{2,1,0} constant({...})
        %w = bf16[4,16,32]{2,1,0} constant({...})
        ROOT %c = bf16[4,8,32]{2,1,0} convolution(%l, %w), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
        """
    )
    assert counts.matrix_flops(read) == 4 * 2 * 8 * 16 * 32


def test_reading_a_slice_inside_a_fusion_costs_the_slice() -> None:
    read = Module(
        textwrap.dedent(
            """\
            HloModule sliced

            %f (a: f32[28,1024], i: s32[]) -> f32[1,1024] {
              %a = f32[28,1024]{1,0} parameter(0)
              %i = s32[] parameter(1)
              %z = s32[] constant(0)
              ROOT %s = f32[1,1024]{1,0} dynamic-slice(%a, %i, %z), dynamic_slice_sizes={1,1024}
            }

            ENTRY %main (p: f32[28,1024], n: s32[]) -> f32[1,1024] {
              %p = f32[28,1024]{1,0} parameter(0)
              %n = s32[] parameter(1)
              ROOT %r = f32[1,1024]{1,0} fusion(%p, %n), kind=kLoop, calls=%f
            }
            """
        )
    )
    assert counts.traffic(read) == 2 * 4096 + 4


def test_an_array_of_all_logits_is_found_and_the_head_is_not_taken_for_one() -> None:
    with_logits = entry("ROOT %l = bf16[4,512,1000]{2,1,0} broadcast(%p), dimensions={}")
    without = entry("%h = bf16[64,1000]{1,0} broadcast(%p), dimensions={}\nROOT %c = f32[80,1000]{1,0} broadcast(%p)")
    assert counts.holds(with_logits, 2048, 1000, 64) == "bf16[4,512,1000]"
    assert counts.holds(without, 2048, 1000, 64) is None
    assert counts.largest(with_logits) == (4 * 512 * 1000 * 2, "bf16[4,512,1000]")


def test_text_that_is_no_module_is_refused() -> None:
    with pytest.raises(HloError, match="no ENTRY computation"):
        Module("nothing")
