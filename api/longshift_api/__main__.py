"""``python -m longshift_api``: serve the API with the settings of the environment."""

import sys

from longshift_api.server import main

sys.exit(main())
