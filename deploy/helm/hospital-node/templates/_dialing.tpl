{{- /* What the roles that only dial out share (hospital node, key-share pod). */ -}}

{{- define "dialing.config" -}}
admin_socket: /run/wardround/admin.sock
{{- end }}

{{- define "dialing.validate" -}}
{{- if not (regexMatch "^.+:[0-9]+$" .Values.config.aggregator) }}
{{- fail (printf "config.aggregator is %q: set the aggregator's address, host:port" .Values.config.aggregator) }}
{{- end }}
{{- if and .Values.config.proxy (not (regexMatch "^http://.+:[0-9]+$" .Values.config.proxy)) }}
{{- fail (printf "config.proxy is %q: write http://host:port" .Values.config.proxy) }}
{{- end }}
{{- end }}

{{- /* The port at the end of host:port */ -}}
{{- define "dialing.port" -}}
{{- regexFind "[0-9]+$" . -}}
{{- end }}

{{- define "dialing.open" -}}
{{- if .Values.config.proxy -}}
the proxy {{ .Values.config.proxy }}
{{- else if .Values.networkPolicy.aggregator.namespace -}}
port 8443 of the aggregator's pods in namespace {{ .Values.networkPolicy.aggregator.namespace }}
{{- else -}}
port {{ include "dialing.port" .Values.config.aggregator }} of {{ .Values.networkPolicy.aggregator.cidrs | join ", " | default "any address" }}
{{- end -}}
{{- end }}
