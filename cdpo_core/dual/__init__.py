"""The multiplier: r_λ and its labels, the offline estimate, the updates, and the certificate that judges the end."""
