"""What a policy is measured by: sampling, figures of merit with intervals, the choice among rounds."""
