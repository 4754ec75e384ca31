"""What hosts send each other in one step of a layout, by arithmetic alone."""

from collections.abc import Sequence

from shardproof.checked_values import checked_whole
from shardproof.errors import UsageError
from shardproof.gradient_buckets import Bucket
from shardproof.leaves import share
from shardproof.tree import nodes_of_run


def check_hosts(tp: int, dp: int, ranks_per_host: int) -> None:
    """Raise unless hosts of so many ranks can hold a layout, with each model on one host.

    Raises:
        UsageError: they cannot.
    """
    checked_whole(ranks_per_host, "ranks_per_host")
    if ranks_per_host % tp:
        raise UsageError(
            f"ranks_per_host={ranks_per_host} is no multiple of tp={tp}, and the ranks that share "
            "a model are on one host here. Use a multiple of tp."
        )
    if tp * dp % ranks_per_host:
        raise UsageError(
            f"tp={tp} times dp={dp} are {tp * dp} ranks, which do not fill hosts of "
            f"{ranks_per_host}. Use a ranks_per_host that divides {tp * dp}."
        )


def sent_by_hosts(
    buckets: Sequence[Sequence[Bucket]], *, leaves: int, dp: int, ranks_per_host: int
) -> tuple[int, ...]:
    """For each host, the bytes that its ranks send to other hosts in the exchange of gradients.

    Ranks of the batch that are on one host add what they have first (`transport.host_sums`). A
    host then sends each node's slices to the hosts that finish them, and what it finishes to all.

    Args:
        buckets: for each rank of the model, the loss and the gradients.
        leaves: number of leaves of the batch.
        dp: number of ranks of the batch.
        ranks_per_host: of the model and of the batch.
    """
    per_host = ranks_per_host // len(buckets)  # ranks of the batch
    num_hosts = dp // per_host
    runs = share(leaves, dp)
    sent = []
    for host in range(num_hosts):
        ours = runs[host * per_host : (host + 1) * per_host]
        num_nodes = len(nodes_of_run(leaves, range(ours[0].start, ours[-1].stop)))
        total = 0
        for each in (bucket for of_rank in buckets for bucket in of_rank):
            for column in map(len, share(sum(each.sizes), per_host)):
                finished = column // num_hosts + (host < column % num_hosts)
                elements = num_nodes * (column - finished) + (num_hosts - 1) * finished
                total += elements * each.dtype.itemsize
        sent.append(total)
    return tuple(sent)
