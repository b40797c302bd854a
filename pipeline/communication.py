"""Time spent in DeepSpeed's collectives, sampled: one step of each window is timed, the others run undisturbed."""

from pipeline.deepspeed import comm


class CommunicationProbe:
    """Times the collectives between `begin` and `end`; on a GPU each is waited for meanwhile."""

    def begin(self) -> None:
        """Start timing."""
        comm.comms_logger.comms_dict.clear()
        comm.configure(enabled=True, prof_all=True, verbose=False)

    def end(self) -> float:
        """Seconds in collectives since `begin`, waiting for slower ranks included."""
        comm.configure(enabled=False, prof_all=False)
        records = comm.comms_logger.comms_dict.values()
        total_ms = sum(sum(latencies) for sizes in records for _, latencies, *_ in sizes.values())
        comm.comms_logger.comms_dict.clear()
        return total_ms / 1e3
