"""Side by side, in one run: what a work costs in plain torch, here and with the peers.

A *work* (`works/`) is what is timed, a *system* (`systems/`) is who does it. Each system lives in
processes of its own, started once (`host`, `rank`), and is told by a wire what to do (`fleet`).
`run` proves equality first, then times the systems in interleaved rounds.
"""
