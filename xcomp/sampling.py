from xcomp.video import sample_indices, uniform_indices  # noqa: F401


def candidate_indices(video, sampling):
    """The candidate frames of a video by a run's sampling rule."""
    return sample_indices(
        video.num_frames,
        video.fps,
        rate=sampling.rate,
        min_frames=sampling.min_frames,
        max_frames=sampling.max_frames,
        multiple=sampling.multiple,
        style=sampling.style,
    )
