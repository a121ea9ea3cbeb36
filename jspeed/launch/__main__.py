"""What another host's launcher starts on this one, see `jspeed.launch.node`."""

from jspeed.launch.node import main

if __name__ == "__main__":
    main()
