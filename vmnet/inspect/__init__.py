"""What an administrator's commands see of a cluster: its objects by the API, its nodes by the agents' pods."""
