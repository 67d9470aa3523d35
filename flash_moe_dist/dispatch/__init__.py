"""How one forward or backward pass of a sharded layer travels between ranks.

Legend of shapes, used as suffixes in this package:

    T  tokens of this rank              R  rows that this rank receives
    K  experts per token                M  pairs that this rank receives
    H  hidden size                      S  rows that this rank sends
    E  experts, e on this rank          P  pairs that this rank sends
    N  T K, slots of this rank          X  most tokens of any rank
    W  ranks                            F  fields of a header, L words of a message

Three choices that are independent of each other, but for what the last line says:

    sizing      exact counts (`exact.py`): one host sync, then messages as long as their content
                static capacity (`capacity.py`): no host sync before everything is launched, then
                the host confirms the pass or runs it again with exact counts
    rows        to the owners of a token's experts: `AllToAllDispatcher`
                to all ranks: `AllGatherDispatcher`
    transport   collectives of torch.distributed (`collectives.py`): NCCL, or gloo
                symmetric memory of one host (`symmetric.py`)

    Static capacity needs rows that go to all ranks, and symmetric memory needs static capacity.

A forward pass with static capacity and symmetric memory on its two streams; |name| is a barrier of
all ranks:

    main  pack |messages| unpack  scores(own)           scores(others) sums(others) |sums| sums(own)
    side                          copy own |rows| copy others ^
    host                          headers . . . . . . . . . . . . . . . . . . . . . . . . . confirm

The way of a pass through the files:

    autograd.py           the autograd function; calls LayerDispatch.run
    capacity.py           LayerDispatch.run: try with static capacity, confirm, else exact counts
    exact.py              the two dispatchers with exact counts
    symmetric.py          the dispatcher over symmetric memory
    base.py               types that all of them share: what is received, combine, metadata
    handshake.py          headers: counts, agreement on settings, errors of other ranks
    header.py             the fields of a header
    routing.py            which pairs go to which rank
    message.py            wire format of the pairs
    *_kernels.py          Triton kernels of the file of that name
    partition.py          which rank owns which expert
    collectives.py        calls into torch.distributed
    symmetric_memory.py   memory that ranks of one host share
    comm_volume.py        bytes of a pass; choice of the cheaper dispatcher
"""
