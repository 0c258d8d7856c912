"""tools/slots.py: ways through loops around products, of a made-up kernel. No GPU, no nvdisasm."""

from __future__ import annotations

import pytest

from tools import slots

# A loop over tiles, around one with a mask (three instructions behind a branch), which waits in a loop of its own, and
# one without. The waiting loop lies behind the exit, where ptxas puts it.
TEXT = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_tile:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_masked:
        /*0020*/                   SYNCS.PHASECHK.TRYWAIT P0, [R3], R4 ;
        /*0030*/              @!P0 BRA `(.L_wait) ;
.L_there:
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, !UPT ;
        /*0050*/                   ISETP.GE.AND P1, PT, R5, R6, PT ;
        /*0060*/               @P1 BRA `(.L_all) ;
        /*0070*/                   BMSK R7, RZ, R8 ;
        /*0080*/                   R2P PR, R7, 0x7f ;
        /*0090*/                   FSEL R24, R24, -INF , P0 ;
.L_all:
        /*00a0*/                   MUFU.EX2 R24, R24 ;
        /*00b0*/               @P2 BRA `(.L_masked) ;
.L_plain:
        /*00c0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, !UPT ;
        /*00d0*/                   BRA.U UP0, `(.L_plain) ;
        /*00e0*/                   @P3 BRA `(.L_tile) ;
        /*00f0*/                   EXIT ;
.L_wait:
        /*0100*/                   NANOSLEEP 0x20 ;
        /*0110*/                   SYNCS.PHASECHK.TRYWAIT P0, [R3], R4 ;
        /*0120*/              @!P0 BRA `(.L_wait) ;
        /*0130*/                   BRA `(.L_there) ;
.L_end:
        /*0140*/                   BRA `(.L_end) ;
        /*0150*/                   NOP ;
"""


def test_ways_through_steps() -> None:
    """Of the innermost loops: without the mask and with it, never the wait but for the branch that leads out of it."""
    masked, plain = slots.steps(TEXT)
    assert masked == slots.Step(shortest=7, longest=10, code=14)
    assert plain == slots.Step(shortest=2, longest=2, code=2)
    assert str(masked) == "7..10 (14)"


def test_blocks_and_who_follows() -> None:
    code, follow = slots.blocks(TEXT)
    assert sum(map(len, code)) == 22
    place = {block[0].split()[0]: number for number, block in enumerate(code)}
    assert follow[place["EXIT"]] == set(), "nobody comes after it"
    assert follow[place["NANOSLEEP"]] == {place["NANOSLEEP"], place["NANOSLEEP"] + 1}
    assert [slots.opcode(text) for text in ("@!UP0 UIADD3 UR4, UR4, 0x1, URZ", "@P0 BRA `(.L)")] == ["UIADD3", "BRA"]


def test_what_it_asks_for(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, word in ((["--as", "wide"], "band+list"), (["--nvdisasm", ""], "nvdisasm")):
        with pytest.raises(SystemExit):
            slots.main(wrong)
        assert word in capsys.readouterr().err
