"""What several tests share: daemons, ranks, random instances, brute force."""
