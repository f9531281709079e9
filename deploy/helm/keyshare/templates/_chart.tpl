{{- /* What a key-share pod has beside the shared parts. */ -}}
{{- define "chart.role" -}}pod{{- end }}
{{- define "chart.open" -}}names and {{ include "dialing.open" . }}{{- end }}
{{- define "chart.kept" -}}the custody log{{- end }}
{{- define "chart.tag" -}}{{ .Chart.AppVersion }}{{- end }}
{{- define "chart.config" -}}{{ include "dialing.config" . }}{{- end }}
{{- define "chart.validate" -}}{{ include "dialing.validate" . }}{{- end }}
{{- define "chart.check" -}}["site", "check", "--config", "/etc/wardround/config/config.yaml", "--connect"]{{- end }}
{{- define "chart.resources" -}}{{ include "wardround.resources" .Values.resources }}{{- end }}
{{- define "chart.annotations" -}}{{- end }}
{{- define "chart.podAnnotations" -}}{{- end }}
{{- define "chart.runtimeClass" -}}{{- end }}
{{- define "chart.env" -}}{{- end }}
{{- define "chart.ports" -}}{{- end }}
{{- define "chart.documents" -}}{{- end }}

{{- define "chart.mounts" -}}
- {name: admin, mountPath: /run/wardround}
{{- end }}

{{- define "chart.volumes" -}}
- name: admin
  emptyDir: {medium: Memory, sizeLimit: 1Mi}
{{- end }}
